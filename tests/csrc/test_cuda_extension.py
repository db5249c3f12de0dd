"""Tests of the CUDA C++ extension that need no GPU: its build, its binary, its checks and its choice of arguments."""

import hashlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tinydrop_kernels.ops import OPERATORS, cuda_extension, registry, use_backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def hash_of_sources(project: Path) -> str:
    """Return the hash that the extension reports as ``SOURCES``."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted((project / "csrc").iterdir()))).hexdigest()[:16]


def copy_of_the_project(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "tinydrop_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


IN_PLACE = ("build_ext", "--inplace")


def build(project: Path, *command: str, hide_torch: bool = False, **variables: str) -> subprocess.CompletedProcess:
    """Run ``setup.py build`` into ``project/lib``, or another command of setup.py."""
    pytest.importorskip("setuptools", minversion="77", reason="building asks for setuptools 77")
    hide = "sys.modules['torch'] = None; " if hide_torch else ""
    program = f"import runpy, sys; {hide}sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    command = [sys.executable, "-c", program, "--quiet", *(command or ("build", "--build-lib", "lib"))]
    command += ["--build-temp", "temp"]
    kept = {k: v for k, v in os.environ.items() if k not in ("TINYDROP_CUDA", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(command, cwd=project, env=kept | variables, capture_output=True, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Build the extension for all three architectures and return the ``lib`` folder."""
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        pytest.skip("the CUDA extension needs nvcc")
    project = copy_of_the_project(tmp_path_factory.mktemp("built"))
    done = build(project, TINYDROP_CUDA="1")
    assert done.returncode == 0, done.stderr
    return project / "lib"


def test_extension_loads_without_a_gpu(built):
    program = """
import sys, torch
from tinydrop_kernels.ops import cuda_extension
assert cuda_extension.available(), cuda_extension.WHY_NOT
print(cuda_extension.ARCHITECTURES, sys.modules["tinydrop_kernels._C"].SOURCES)
print(torch.ops.tinydrop_cuda.varlen_attention.default._schema)
x = torch.zeros(4, 2, 64, dtype=torch.half)
c = torch.tensor([0, 4], dtype=torch.int32)
runs = cuda_extension.compiled_for
assert runs(8, 6) and runs(9, 0) and not runs(7, 5)
try:
    cuda_extension.launch(x, x, x, c, c, 4, 4, None, None, None, (1, 1), 0)
except NotImplementedError as error:
    assert "CPU" in str(error)
else:
    raise AssertionError("there is no implementation for CPU")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"('80', '90a', '100') {hash_of_sources(ROOT)}\n" in done.stdout
    assert "Tensor? bias_table, Tensor? positions, int grid_rows, int grid_columns) -> Tensor" in done.stdout
    assert [file.name for file in (built / "tinydrop_kernels").glob("_C*")] == ["_C.abi3.so"]


# Arguments that the launcher must refuse, by the name that the message must begin with.
REFUSED = {
    "query": ["x[0]", "x.float()", "x[:, :, :60]", "torch.zeros(4, 2, 136).half()", "x[:1, :1].expand(4, 2**24, 64)"],
    "key": [
        *("x[0]", "x.bfloat16()", "x[:, :1]", "x[:, :, :1].expand(4, 2, 64)"),
        "torch.zeros(4, 2, 65).half()[:, :, 1:]",
        "torch.zeros(4, 2, 72).half()[:, :, 1:65]",
        "torch.empty(2**30 + 128, dtype=x.dtype).as_strided((2, 2, 64), (2**30, 64, 1))",
    ],
    "value": ["x[:3]", "x.float()"],
    "cu_seqlens_q": ["c[None]", "c[:0]", "c.long()", "torch.zeros(4).int()[::2]"],
    "cu_seqlens_k": ["c[:1]", "c.long()"],
    "max_seqlen_q": ["-1"],
    "max_seqlen_k": ["-1"],
    "scale": ["0.0", "-1.0", "math.nan", "math.inf", "1e-46", "3e38"],
    "bias_table": ["b.bfloat16()", "b[:, :1]", "b[:7]", "b[:, 0]"],
    "positions": ["None", "p[:3]", "p.long()", "torch.zeros(8).int()[::2]"],
    "grid_rows": ["0", "2000"],
    "grid_columns": ["0", "2000"],
}
LAUNCHER = """
import math, sys, torch
from tinydrop_kernels.ops import cuda_extension
x, c = torch.zeros(4, 2, 64).half(), torch.tensor([0, 4]).int()
b, p = torch.zeros(9, 2).half(), torch.arange(4).int()
def launch(**instead):
    fine = dict(query=x, key=x, value=x, cu_seqlens_q=c, cu_seqlens_k=c, max_seqlen_q=4, max_seqlen_k=4, scale=1.0)
    fine |= dict(bias_table=b, positions=p, grid_rows=2, grid_columns=2)
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        torch.ops.tinydrop_cuda.varlen_attention.default.redispatch(on_cuda, *(fine | instead).values())
    except RuntimeError as error:
        return str(error).splitlines()[0]
for case in sys.argv[1:]:
    name, _, value = case.partition("=")
    message = launch(**{name: eval(value)})
    print("right" if message and message.startswith(name + ": ") else "WRONG", case, message)
print("fine:", launch())
"""


def test_launcher_refuses_by_name(built):
    """Check every refusal that CPU tensors reach when they are dispatched as if they were on CUDA."""
    cases = [f"{name}={value}" for name, values in REFUSED.items() for value in values]
    command = [sys.executable, "-c", LAUNCHER, *cases]
    done = subprocess.run(command, cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, fine = done.stdout.splitlines()
    assert len(lines) == len(cases)
    assert [line for line in lines if not line.startswith("right")] == []
    assert not re.match(r"fine: (query|key|value|cu_|max_|scale|bias|positions|grid)", fine)


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not_run"),
    [
        ("80", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("100f", [(10, 0)], [(9, 0), (12, 0)]),
        ("100", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("90+PTX", [(9, 0), (10, 3), (12, 0)], [(8, 9)]),
    ],
)
def test_gpus_that_code_runs_on(monkeypatch, architecture, runs, does_not_run):
    monkeypatch.setattr(cuda_extension, "ARCHITECTURES", (architecture,))
    assert all(cuda_extension.compiled_for(*gpu) for gpu in runs)
    assert not any(cuda_extension.compiled_for(*gpu) for gpu in does_not_run)


class OnCuda(SimpleNamespace):
    """A stand-in for a tensor on a GPU, with the attributes that the choice of an implementation reads."""

    is_cuda, device, dtype = True, SimpleNamespace(type="cuda", index=0), torch.float16
    __len__ = lambda self: self.shape[0]  # noqa: E731

    @classmethod
    def of(cls, *shape, row_stride=None):
        tensor = torch.empty(shape, device="meta")
        strides = (row_stride or tensor.stride(0), *tensor.stride()[1:])
        stride = lambda dim=None: strides if dim is None else strides[dim]  # noqa: E731
        return cls(shape=tensor.shape, stride=stride, data_ptr=lambda: 0)


@pytest.fixture(params=[True, False], ids=["227 KB", "99 KB"])
def has_room(request, monkeypatch):
    """Pretend that the extension is loaded, on a GPU with 227 KB of shared memory per block or with 99 KB."""
    monkeypatch.setattr(cuda_extension, "WHY_NOT", "")
    monkeypatch.setattr(cuda_extension, "_gpu", lambda index: (True, request.param))
    # Clear the cache, because it remembers which implementations the machine has.
    registry._preference.cache_clear()
    yield request.param
    registry._preference.cache_clear()


def chosen(scale=None, table=None, positions=None, grid_size=(1, 1), skip_keys=0, head_dim=64, row_stride=None):
    tensor = OnCuda.of(4, 2, head_dim, row_stride=row_stride)
    rest = (None, None, 4, 4, scale, table, positions, grid_size, skip_keys)
    return OPERATORS["varlen_attention"].choose(tensor, tensor, tensor, *rest).name


def test_what_it_takes(monkeypatch, has_room):
    def takes(*options, **layout):
        with use_backend("cuda"):
            return chosen(*options, **layout) == "cuda"

    assert takes() and takes(0.125) and takes(head_dim=128) and not takes(head_dim=136) and not takes(head_dim=60)
    assert not any(takes(scale) for scale in (0.0, -1.0, 1e-46, 3e38, math.nan, math.inf))
    assert takes(row_stride=2**27) and not takes(row_stride=2**30)
    assert not takes(skip_keys=1)
    bias = OnCuda.of(9, 2), None
    assert takes(None, *bias, (32, 32)) and not takes(None, *bias, (33, 1))
    assert takes(None, *bias, (2, 2), head_dim=80) == has_room
    monkeypatch.setattr(cuda_extension, "_gpu", lambda index: (False, True))
    assert not takes()


def test_launch_makes_vectors_contiguous(monkeypatch):
    monkeypatch.setattr(torch.ops, "tinydrop_cuda", SimpleNamespace(varlen_attention=lambda *args: args), raising=False)
    vector = torch.arange(8).int()[::2]
    tensor = torch.zeros(4, 1, 8)
    arguments = cuda_extension.launch(tensor, tensor, tensor, vector, vector, 4, 4, None, None, vector, (3, 5), 0)
    assert all(arguments[i].is_contiguous() and arguments[i].equal(vector) for i in (3, 4, 9))
    assert arguments[7] == 8**-0.5 and arguments[10:] == (3, 5)


def cuobjdump() -> str:
    """Return the path of cuobjdump, from the CUDA toolkit or from Triton; skip the test if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        if (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    pytest.skip("no cuobjdump to look into the extension")


def test_no_kernel_spills(built):
    command = [cuobjdump(), "-res-usage", built / "tinydrop_kernels" / "_C.abi3.so"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S*varlen_attention_kernel\S*):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output)
    assert len(kernels) == 3 * 2 * 2 * 6  # architectures, dtypes, bias or not, head dimensions
    assert [kernel for kernel in kernels if kernel[2:] != ("0", "0")] == []
    assert max(int(registers) for _, registers, *_ in kernels) <= 255


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_products_are_on_tensor_cores(built, architecture):
    extension = built / "tinydrop_kernels" / "_C.abi3.so"
    command = [cuobjdump(), "-sass", "-arch", architecture, extension]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = re.split(r"Function : (?=\S*varlen_attention_kernel)", sass)[1:]
    assert len(bodies) == 2 * 2 * 6
    for body in bodies:
        assert "HMMA.16816.F32" in body and "LDSM.16" in body and "LDGSTS" in body
        assert "LDL" not in body and "STL" not in body


# -- setup.py, with one toolkit whose compiler always fails and one whose compiler ignores the sources


@pytest.fixture
def project(tmp_path):
    return copy_of_the_project(tmp_path)


@pytest.fixture
def broken_toolkit(tmp_path):
    home = tmp_path / "cuda"
    for name, text in {
        "bin/nvcc": "#!/bin/sh\necho 'fatal error: out of luck' >&2\nexit 1\n",
        "include/cuda_runtime.h": "",
    }.items():
        file = home / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    return str(home)


@pytest.fixture
def hollow_toolkit(tmp_path):
    """Make a toolkit whose nvcc knows GPUs up to 9.0 and writes object files that hold only its command line."""
    if shutil.which("g++") is None:
        pytest.skip("linking an extension needs g++")
    home = tmp_path / "hollow"
    nvcc = """#!/bin/sh
[ "$1" = --list-gpu-code ] && echo 'sm_75 sm_80 sm_86 sm_90' && exit
echo "extern const char command[]; const char command[] = \\"$*\\";" | g++ -fPIC -x c++ -c -o "$4" -
"""
    for name, text in {"bin/nvcc": nvcc, "include/cuda_runtime.h": "", "lib64/libcudart_static.a": "!<arch>\n"}.items():
        file = home / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)
    return str(home)


def lines_about_the_extension(done):
    return [line for line in (done.stdout + done.stderr).splitlines() if "CUDA" in line]


def assert_pure_python(project):
    built = project / "lib" / "tinydrop_kernels"
    assert (built / "__init__.py").is_file() and not list(built.glob("_C*"))


def test_failed_build_leaves_a_pure_package(project, broken_toolkit):
    done = build(project, CUDA_HOME=broken_toolkit)
    assert done.returncode == 0, done.stderr
    assert lines_about_the_extension(done) == [
        "tinydrop_kernels: built without its CUDA extension: nvcc failed: fatal error: out of luck"
    ]
    assert_pure_python(project)


def built_extension(project: Path, folder: str = "lib") -> bytes:
    (file,) = (project / folder / "tinydrop_kernels").glob("_C*")
    return file.read_bytes()


def test_edited_source_is_linked_anew(project, hollow_toolkit):
    built = []
    for line in ("// once", "// twice"):
        with (project / "csrc" / "varlen_attention.cuh").open("a") as source:
            source.write(line)
        assert build(project, CUDA_HOME=hollow_toolkit, TINYDROP_CUDA="1").returncode == 0
        built.append(built_extension(project))
        assert hash_of_sources(project).encode() in built[-1]
    assert built[0] != built[1]


@pytest.mark.parametrize("command", [(), IN_PLACE], ids=["build", "in place"])
def test_failed_build_leaves_no_earlier_library(project, hollow_toolkit, broken_toolkit, command):
    folder = "." if command else "lib"
    assert build(project, *command, CUDA_HOME=hollow_toolkit).returncode == 0
    assert built_extension(project, folder)
    assert build(project, *command, CUDA_HOME=broken_toolkit).returncode == 0
    assert not list((project / folder / "tinydrop_kernels").glob("_C*"))


@pytest.mark.parametrize(
    ("asked", "built", "options"),
    [
        ("", b"80;90a", b"compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a"),
        ("7.0 8.6 9.0+PTX", b"86;90+PTX", b"compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90"),
    ],
    ids=["default", "asked"],
)
def test_architectures(project, hollow_toolkit, asked, built, options):
    done = build(project, CUDA_HOME=hollow_toolkit, TINYDROP_CUDA="1", TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode == 0, done.stderr
    library = built_extension(project)
    assert b"\0" + built + b"\0" in library and options in library


@pytest.mark.parametrize(("asked", "complaint"), [("7.0;7.5", "need 8.0 or later"), ("Hopper", "expected for example")])
def test_architectures_that_are_refused(project, hollow_toolkit, asked, complaint):
    done = build(project, CUDA_HOME=hollow_toolkit, TINYDROP_CUDA="1", TORCH_CUDA_ARCH_LIST=asked)
    assert done.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: got '{asked}'" in done.stderr and complaint in done.stderr


def test_demanded_build_fails_loudly(project, broken_toolkit):
    done = build(project, CUDA_HOME=broken_toolkit, TINYDROP_CUDA="1")
    assert done.returncode != 0
    assert lines_about_the_extension(done) == [
        "TINYDROP_CUDA=1, but the CUDA extension did not build: nvcc failed: fatal error: out of luck"
    ]


def test_demanded_without_a_toolkit(project, tmp_path):
    done = build(project, CUDA_HOME=str(tmp_path / "nowhere"), TINYDROP_CUDA="1")
    assert done.returncode != 0
    assert len(lines_about_the_extension(done)) == 1 and "no CUDA toolkit in" in done.stderr


@pytest.mark.parametrize(
    "variables", [{"TINYDROP_CUDA": "0"}, {"CUDA_HOME": "/nowhere"}], ids=["forbidden", "no toolkit"]
)
def test_pure_package_without_a_word(project, variables):
    done = build(project, **variables)
    assert done.returncode == 0 and lines_about_the_extension(done) == []
    assert_pure_python(project)


def test_isolated_build_is_pure_python(project):
    """Check a build without torch, because pip's build isolation hides torch."""
    done = build(project, hide_torch=True)
    assert done.returncode == 0 and lines_about_the_extension(done) == []
    assert_pure_python(project)
    done = build(project, hide_torch=True, TINYDROP_CUDA="1")
    assert done.returncode != 0
    assert len(lines_about_the_extension(done)) == 1 and "torch is not found" in done.stderr


def test_bad_wishes_are_refused(project):
    done = build(project, TINYDROP_CUDA="yes")
    assert done.returncode != 0 and "TINYDROP_CUDA: got 'yes', expected 0 or 1" in done.stderr


def test_torch_is_no_build_requirement():
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text()).group(1)
    assert "torch" not in requires
