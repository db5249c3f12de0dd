"""The CUDA C++ extension, proven without a GPU.

Its kernel's own source is compiled for the host and run by an emulator (tests/cuda_emulator) against float64; the
extension itself is built, loaded and looked into. Skipped where there is no compiler to do so.
"""

import ctypes
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
from conftest import tiny_guidance, tiny_vit, varied_images

import tinydrop_kernels as tdk
from tinydrop_kernels.ops import attention_backends, cuda

ROOT = Path(__file__).parents[1]
EMULATOR = Path(__file__).parent / "cuda_emulator"
SHARED = {"a100": 164 * 1024, "h100": 228 * 1024, "none": 0}  # of a multiprocessor; with none, all keys are streamed
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative error in norm
GUARD = 3  # rows around every tensor, which hold NaN and must neither be read nor written

# Nothing, one row, the borders of a 16-row mma, of a 32-key step, of a 64-key tile, of two and four, and ViT's own.
LENGTHS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 50, 63, 64, 65, 0, 99, 127, 128, 129, 197, 198, 257]
SHORT = [33, 0, 1, 16, 65, 17]


def toolkit_headers() -> Path | None:
    """A folder with cuda_fp16.h: the toolkit's, or that of the pip packages that come with torch."""
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [Path(name) / "include" for name in [*named, "/usr/local/cuda"]]
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        folders += sorted(Path(folder).glob("cu*/include")) + sorted(Path(folder).glob("cuda_runtime/include"))
    return next((folder for folder in folders if (folder / "cuda_fp16.h").is_file()), None)


class View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("head_stride", ctypes.c_int64))

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr(), *tensor.stride()[:2])


class LaunchPlan(ctypes.Structure):
    _fields_ = (
        ("warps", ctypes.c_int),
        ("row_blocks_per_warp", ctypes.c_int),
        ("query_blocks", ctypes.c_int64),
        ("key_capacity", ctypes.c_int),
        ("streams_keys", ctypes.c_bool),
        ("shared_bytes", ctypes.c_int64),
    )


class Arguments(ctypes.Structure):
    """``AttentionArguments`` of csrc/varlen_attention.cuh."""

    _fields_ = (
        ("query", View),
        ("key", View),
        ("value", View),
        ("out", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("bias_table", View),
        ("positions", ctypes.c_void_p),
        ("grid_rows", ctypes.c_int),
        ("grid_columns", ctypes.c_int),
        ("class_token_entries", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("head_dim", ctypes.c_int),
        ("scale_log2", ctypes.c_float),
        ("plan", LaunchPlan),
    )


def emulator(folder: Path, csrc: Path, optimise: str = "-O2"):
    """The emulated kernel of these sources: ``run(query, key, value, seqlens_q, seqlens_k, ...) -> out, plan``."""
    compiler, headers = shutil.which("g++"), toolkit_headers()
    if compiler is None or headers is None:
        pytest.skip("the emulator needs g++ and CUDA's headers")
    library = folder / "varlen_attention.so"
    sources = [EMULATOR / "emulator.cpp", EMULATOR / "varlen_attention.cpp"]
    flags = ["-std=c++17", optimise, "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    folders = [f"-I{EMULATOR}", f"-I{csrc}", "-isystem", headers]
    done = subprocess.run([compiler, *flags, *folders, *sources, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).emulate_varlen_attention
    function.restype = ctypes.c_char_p
    integers = [ctypes.c_int, *[ctypes.c_int64] * 4, ctypes.c_int]
    function.argtypes = [ctypes.POINTER(Arguments), *integers]

    def run(
        query, key, value, seqlens_q, seqlens_k, scale=None, bias=None, multiprocessor="h100", early=False, longest=None
    ):
        total, heads, head_dim = query.shape
        guarded = torch.full((total + 2 * GUARD, heads, head_dim), float("nan"), dtype=query.dtype)
        out = guarded[GUARD : GUARD + total]
        cu_seqlens = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (seqlens_q, seqlens_k)]
        arguments = Arguments(
            query=View.of(query),
            key=View.of(key),
            value=View.of(value),
            out=out.data_ptr(),
            cu_seqlens_q=cu_seqlens[0].data_ptr(),
            cu_seqlens_k=cu_seqlens[1].data_ptr(),
            grid_rows=1,
            grid_columns=1,
            heads=heads,
            head_dim=head_dim,
            scale_log2=(head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        )
        if bias is not None:
            table, positions, (arguments.grid_rows, arguments.grid_columns) = bias
            arguments.bias_table, arguments.positions = View.of(table), positions.data_ptr()
            distances = (2 * arguments.grid_rows - 1) * (2 * arguments.grid_columns - 1)
            arguments.class_token_entries = len(table) > distances
        longest = longest or [max(lengths, default=0) for lengths in (seqlens_q, seqlens_k)]
        shared = SHARED[multiprocessor]
        bfloat16 = query.dtype == torch.bfloat16
        error = function(ctypes.byref(arguments), bfloat16, len(seqlens_q), *longest, shared, early)
        assert error == b"", error.decode()
        assert guarded[:GUARD].isnan().all() and guarded[GUARD + total :].isnan().all(), "rows around out were written"
        return out, arguments.plan

    return run


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    return emulator(tmp_path_factory.mktemp("emulator"), ROOT / "csrc")


def exact(query, key, value, seqlens_q, seqlens_k, scale=None, bias=None):
    """Attention in float64, segment by segment, as its formula is written."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros(query.shape, dtype=torch.float64)
    q0 = k0 = 0
    for rows, keys in zip(seqlens_q, seqlens_k, strict=True):
        q, k, v = query[q0 : q0 + rows], key[k0 : k0 + keys], value[k0 : k0 + keys]
        scores = scale * torch.einsum("qhd,khd->hqk", q.double(), k.double())
        if bias is not None:
            scores += exact_bias(*bias, slice(q0, q0 + rows))
        out[q0 : q0 + rows] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1) if keys else scores, v.double())
        q0, k0 = q0 + rows, k0 + keys
    return out


def exact_bias(table, positions, grid_size, segment):
    """``(heads, n, n)``, by BEiT's numbering of relative positions (timm's ``gen_relative_position_index``)."""
    rows, columns = grid_size
    p = positions[segment].long()
    dy, dx = (p // columns)[:, None] - (p // columns), (p % columns)[:, None] - (p % columns)
    index = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    of_class = p < 0
    index[of_class] = len(table) - 3
    index[:, of_class] = len(table) - 2
    index[of_class[:, None] & of_class] = len(table) - 1
    return table.double()[index].permute(2, 0, 1)


def packed_qkv(seqlens, heads, head_dim, dtype, spread=1.0):
    """Query, key and value as views of timm's projection ``(total, 3, heads, head_dim)``, NaN before and after it."""
    total = sum(seqlens)
    guarded = torch.full((total + 2 * GUARD, 3, heads, head_dim), float("nan"), dtype=dtype)
    guarded[GUARD : GUARD + total] = spread * torch.randn(total, 3, heads, head_dim)
    return guarded[GUARD : GUARD + total].unbind(1)


def guarded_bias(table, positions, grid):
    """Between values that must not be read: NaN, and patches far beyond the table."""
    tables = table.new_full((len(table) + 2 * GUARD, *table.shape[1:]), float("nan"))
    tables[GUARD:-GUARD] = table
    patches = torch.full((len(positions) + 2 * GUARD,), 2**30, dtype=torch.int32)
    patches[GUARD:-GUARD] = positions
    return tables[GUARD:-GUARD], patches[GUARD:-GUARD], grid


def check(emulate, query, key, value, seqlens_q, seqlens_k, **options):
    out, plan = emulate(query, key, value, seqlens_q, seqlens_k, **options)
    expected = exact(query, key, value, seqlens_q, seqlens_k, options.get("scale"), options.get("bias"))
    assert out.isfinite().all()
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    print(f"relative error {error:.1e}")
    assert error <= TOLERANCE[query.dtype]
    return plan


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_every_length(emulate, dtype, early):
    query, key, value = packed_qkv(LENGTHS, 2, 64, dtype)
    plan = check(emulate, query, key, value, LENGTHS, LENGTHS, early=early)
    assert not plan.streams_keys and plan.query_blocks == 1 and plan.row_blocks_per_warp == 3


# One for each compiled head dimension, then those that are padded: 72 (SO400M), 88 (ViT-g), 104 (ViT-G), and the least.
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128, 72, 88, 104, 8])
def test_every_head_dim(emulate, head_dim, multiprocessor, dtype):
    query, key, value = packed_qkv(SHORT, 3, head_dim, dtype)
    plan = check(emulate, query, key, value, SHORT, SHORT, multiprocessor=multiprocessor)
    assert plan.streams_keys == (multiprocessor == "none")


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_streamed_keys(emulate, early):
    query, key, value = packed_qkv(LENGTHS, 1, 64, torch.float16)
    plan = check(emulate, query, key, value, LENGTHS, LENGTHS, multiprocessor="none", early=early)
    assert plan.streams_keys and plan.query_blocks == 3


@pytest.mark.parametrize(("seqlens", "multiprocessor"), [([577], "h100"), ([577, 20], "a100"), ([1370], "h100")])
def test_long_segments(emulate, seqlens, multiprocessor):
    query, key, value = packed_qkv(seqlens, 1, 64, torch.bfloat16)
    assert check(emulate, query, key, value, seqlens, seqlens, multiprocessor=multiprocessor).streams_keys


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
def test_large_scores(emulate, dtype):
    query, key, value = packed_qkv(SHORT, 2, 64, dtype, spread=40.0)
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double())
    assert scores.abs().max() > 1e4
    check(emulate, query, key, value, SHORT, SHORT, scale=1.0)


def test_growing_scores(emulate):
    """Every step's maximum exceeds the one before: at first by less than what a step tolerates, then by more."""
    query, key, value = packed_qkv([257], 1, 64, torch.float16)
    query = torch.ones_like(query)
    key = (torch.arange(257)[:, None, None] ** 2 / 4096 + 0.1 * key).half()
    check(emulate, query, key, value, [257], [257])


def test_equal_scores_average_the_values(emulate):
    query, key, value = packed_qkv([50, 197], 2, 64, torch.float16)
    key = torch.zeros_like(key)
    out, _ = emulate(query, key, value, [50, 197], [50, 197])
    torch.testing.assert_close(out[0].double(), value[:50].double().mean(0), atol=2e-4, rtol=2e-3)
    check(emulate, query, key, value, [50, 197], [50, 197])


@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
def test_cross_attention(emulate, multiprocessor):
    """As a map pool does it: a query or a few for each segment, and queries whose segment has no keys."""
    seqlens_q, seqlens_k = [1, 1, 2, 1, 0, 150], [65, 0, 197, 3, 40, 20]
    _, key, value = packed_qkv(seqlens_k, 2, 64, torch.float16)
    query = torch.randn(sum(seqlens_q), 2, 64).half()
    check(emulate, query, key, value, seqlens_q, seqlens_k, multiprocessor=multiprocessor)
    out, _ = emulate(query, key, value, seqlens_q, seqlens_k, multiprocessor=multiprocessor)
    assert (out[1] == 0).all()


def test_keys_beyond_the_bound_are_not_read(emulate):
    """max_seqlen_k is not checked; what exceeds it must not be written over the rest of shared memory."""
    query, key, value = packed_qkv([50, 100], 2, 64, torch.float16)
    out, plan = emulate(query, key, value, [50, 100], [50, 100], longest=[100, 40])
    assert plan.key_capacity == 64 and not plan.streams_keys
    expected = exact(query[50:], key[50:114], value[50:114], [100], [64])
    torch.testing.assert_close(out[50:].double(), expected, atol=2e-3, rtol=2e-3)


def test_offsets_beyond_32_bits(emulate):
    """Rows 256 MB apart: 5 GB of addresses, of which few are touched."""
    rows, stride = 20, 2**27
    try:
        memory = torch.empty((rows - 1) * stride + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("5 GB of addresses are refused here")
    far = memory.as_strided((rows, 1, 64), (stride, 64, 1)).copy_(torch.randn(rows, 1, 64))
    check(emulate, far, far, far, [18, 2], [18, 2])


def test_no_keys_at_all(emulate):
    query, nothing = torch.randn(20, 2, 64).half(), torch.empty(0, 2, 64).half()
    out, _ = emulate(query, nothing, nothing, [17, 3], [0, 0])
    assert (out == 0).all()


@pytest.mark.parametrize("seqlens", [[], [0], [0, 0, 0]])
def test_nothing_to_do(emulate, seqlens):
    query, key, value = packed_qkv(seqlens, 2, 64, torch.float16)
    emulate(query, key, value, seqlens, seqlens)


def test_every_operand_has_its_own_strides(emulate):
    seqlens = [20, 0, 70]
    query = torch.randn(2, 90, 64).half().transpose(0, 1)  # heads outermost
    key = torch.randn(90, 2, 3, 64).half()[:, :, 1]
    value = torch.randn(90, 5, 72).half()[:, 1:3, :64]
    check(emulate, query, key, value, seqlens, seqlens)


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
@pytest.mark.parametrize("class_token", [True, False], ids=["class", "patches"])
def test_bias(emulate, class_token, multiprocessor, early):
    heads, grid = 2, (7, 20)
    seqlens = [50, 0, 1, 132, 16]
    positions = []
    for length in seqlens:
        patches = torch.randperm(grid[0] * grid[1])[: length - 1 if class_token and length else length].sort().values
        positions += [torch.tensor([-1])[: min(length, 1)], patches] if class_token else [patches]
    positions = torch.cat(positions).int()
    table = torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * class_token, heads).bfloat16()
    query, key, value = packed_qkv(seqlens, heads, 64, torch.bfloat16)
    options = {"bias": guarded_bias(table, positions, grid), "multiprocessor": multiprocessor, "early": early}
    check(emulate, query, key, value, seqlens, seqlens, **options)


def check_hidden_keys(emulate, multiprocessor="h100"):
    """A bias of -inf hides what lies more than two rows above, from the last rows two whole tiles of keys."""
    grid = rows, columns = 20, 8
    table = torch.randn(2 * rows - 1, 2 * columns - 1, 1)
    table[rows + 2 :] = -math.inf
    bias = guarded_bias(table.flatten(0, 1).half(), torch.arange(rows * columns).int(), grid)
    query, key, value = packed_qkv([rows * columns], 1, 64, torch.float16)
    check(emulate, query, key, value, [160], [160], bias=bias, multiprocessor=multiprocessor)


@pytest.mark.parametrize("multiprocessor", ["h100", "none"], ids=["resident", "streamed"])
def test_bias_that_hides_keys(emulate, multiprocessor):
    check_hidden_keys(emulate, multiprocessor)


@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 128])
def test_bias_at_every_head_dim(emulate, head_dim):
    seqlens, grid = [5, 40], (6, 8)
    positions = torch.tensor([*range(-1, 4), *range(-1, 39)]).int()
    table = torch.randn(2, 11 * 15 + 3).half().t()  # columns contiguous
    query, key, value = packed_qkv(seqlens, 2, head_dim, torch.float16)
    check(emulate, query, key, value, seqlens, seqlens, bias=(table, positions, grid))


def test_launches_fill_their_blocks(emulate):
    """197 rows are 13 row blocks: two for each of 7 warps, and room for two blocks on an H100's multiprocessor."""
    query, key, value = packed_qkv([197], 1, 64, torch.float16)
    _, plan = emulate(query, key, value, [197], [197])
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (7, 2, 1)
    assert 2 * (plan.shared_bytes + 1024) <= SHARED["h100"]
    query, key, value = packed_qkv([100], 1, 64, torch.float16)  # four of these fit, with four warps each
    _, plan = emulate(query, key, value, [100], [100])
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (4, 2, 1)
    assert 4 * (plan.shared_bytes + 1024) <= SHARED["h100"]
    _, plan = emulate(query[:1], key, value, [1], [100])  # a pool's query: its keys are copied by two warps
    assert (plan.warps, plan.row_blocks_per_warp, plan.query_blocks) == (2, 1, 1)


@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "class_token": False}], ids=["token", "map pool"])
def test_patched_model(emulate, monkeypatch, options):
    """A whole ViT whose attention runs on the extension's kernel: exits, few tokens, all tokens; a pool's query."""

    def launch(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=None, *bias):
        lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        return emulate(query, key, value, *lengths, scale=scale)[0]

    vit = tiny_vit(**options).bfloat16()
    tdk.patch(vit, tiny_guidance(), tdk.DropPolicy(tau=0.5, gamma=1.0, min_keep=0.1))
    images = varied_images(6).bfloat16()
    with torch.inference_mode():
        wanted = vit(images)
        emulated = attention_backends.Implementation("cuda", lambda device: True, lambda *_: True, launch, "emulated")
        monkeypatch.setattr(attention_backends, "IMPLEMENTATIONS", (emulated,))
        out = vit(images)
    counts = vit.tinydrop.last.selection.counts.tolist()
    assert 0 in counts and len(set(counts)) > 2
    torch.testing.assert_close(out, wanted, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(
    ("line", "instead", "complaint"),
    [
        ("wait_for_copies(ahead - 1);", "wait_for_copies(ahead);", "before a barrier|isfinite"),
        ("        __syncthreads();\n", "", "another"),
        ("chunk ^ row", "chunk ^ 0 * row", "share banks"),
        ("origin[2] = {-FLT_MAX, -FLT_MAX}", "origin[2] = {-INFINITY, -INFINITY}", "isfinite"),
        ("num_keys = min(num_keys, a.plan.key_capacity)", "(void)0", "beyond"),
    ],
    ids=["wait", "barrier", "swizzle", "origin", "capacity"],
)
def test_the_emulator_catches_what_is_missing(tmp_path, line, instead, complaint):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    kernel = tmp_path / "csrc" / "varlen_attention.cuh"
    assert kernel.read_text().count(line) == 1
    kernel.write_text(kernel.read_text().replace(line, instead))
    emulate = emulator(tmp_path, tmp_path / "csrc", optimise="-O0")
    query, key, value = packed_qkv([197], 1, 64, torch.float16)
    with pytest.raises(AssertionError, match=complaint):
        check(emulate, query, key, value, [197], [197], multiprocessor="none")
        check_hidden_keys(emulate)
        emulate(query, key, value, [197], [197], longest=[197, 40])


# -- The extension itself


def hash_of_sources(project: Path) -> str:
    """As the extension tells it."""
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
    """``setup.py build`` into ``project/lib``, or another command."""
    pytest.importorskip("setuptools", minversion="77", reason="building asks for setuptools 77")
    hide = "sys.modules['torch'] = None; " if hide_torch else ""
    program = f"import runpy, sys; {hide}sys.argv[0] = 'setup.py'; runpy.run_path('setup.py')"
    command = [sys.executable, "-c", program, "--quiet", *(command or ("build", "--build-lib", "lib"))]
    command += ["--build-temp", "temp"]
    kept = {k: v for k, v in os.environ.items() if k not in ("TINYDROP_CUDA", "TORCH_CUDA_ARCH_LIST")}
    return subprocess.run(command, cwd=project, env=kept | variables, capture_output=True, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A project built with its extension for all three GPUs: its ``lib`` folder."""
    if shutil.which("nvcc") is None and not os.environ.get("CUDA_HOME"):
        pytest.skip("the CUDA extension needs nvcc")
    project = copy_of_the_project(tmp_path_factory.mktemp("built"))
    done = build(project, TINYDROP_CUDA="1")
    assert done.returncode == 0, done.stderr
    return project / "lib"


def test_extension_loads_without_a_gpu(built):
    program = """
import sys, torch
from tinydrop_kernels.ops import cuda
assert cuda.available(), cuda.WHY_NOT
print(cuda.ARCHITECTURES, sys.modules["tinydrop_kernels._C"].SOURCES)
print(torch.ops.tinydrop_cuda.varlen_attention.default._schema)
x = torch.zeros(4, 2, 64, dtype=torch.half)
c = torch.tensor([0, 4], dtype=torch.int32)
assert cuda.compiled_for(8, 6) and cuda.compiled_for(9, 0) and not cuda.compiled_for(7, 5)
try:
    cuda.launch(x, x, x, c, c, 4, 4)
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


# What the launcher does not take.
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
from tinydrop_kernels.ops import cuda
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
    """As far as it gets with tensors on the CPU that are declared to be on CUDA."""
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
    monkeypatch.setattr(cuda, "ARCHITECTURES", (architecture,))
    assert all(cuda.compiled_for(*gpu) for gpu in runs)
    assert not any(cuda.compiled_for(*gpu) for gpu in does_not_run)


class OnCuda(SimpleNamespace):
    """What ``fits`` asks of a tensor on a GPU."""

    is_cuda, device, dtype = True, SimpleNamespace(index=0), torch.float16

    @classmethod
    def of(cls, *shape, row_stride=None):
        tensor = torch.empty(shape, device="meta")
        strides = (row_stride or tensor.stride(0), *tensor.stride()[1:])
        stride = lambda dim=None: strides if dim is None else strides[dim]  # noqa: E731
        return cls(shape=tensor.shape, stride=stride, data_ptr=lambda: 0)


@pytest.mark.parametrize("has_room", [True, False], ids=["227 KB", "99 KB"])
def test_what_fits(monkeypatch, has_room):
    monkeypatch.setattr(cuda, "WHY_NOT", "")
    monkeypatch.setattr(cuda, "_gpu", lambda index: (True, has_room))

    def fits(*options, head_dim=64, row_stride=None):
        tensor = OnCuda.of(4, 2, head_dim, row_stride=row_stride)
        return cuda.fits(tensor, tensor, tensor, None, None, 4, 4, *options)

    assert fits() and fits(0.125) and fits(head_dim=128) and not fits(head_dim=136) and not fits(head_dim=60)
    assert not any(fits(scale) for scale in (0.0, -1.0, 1e-46, 3e38, math.nan, math.inf))
    assert fits(row_stride=2**27) and not fits(row_stride=2**30)
    bias = OnCuda.of(9, 2), None
    assert fits(None, *bias, (32, 32)) and not fits(None, *bias, (33, 1))
    assert fits(None, *bias, (2, 2), head_dim=80) == has_room
    monkeypatch.setattr(cuda, "_gpu", lambda index: (False, True))
    assert not fits()


def test_launch_makes_vectors_contiguous(monkeypatch):
    monkeypatch.setattr(torch.ops, "tinydrop_cuda", SimpleNamespace(varlen_attention=lambda *args: args), raising=False)
    vector = torch.arange(8).int()[::2]
    tensor = torch.zeros(4, 1, 8)
    arguments = cuda.launch(tensor, tensor, tensor, vector, vector, 4, 4, None, None, vector)
    assert all(arguments[i].is_contiguous() and arguments[i].equal(vector) for i in (3, 4, 9))


def cuobjdump() -> str:
    """From the toolkit, or as Triton brings it."""
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


# -- setup.py, with a toolkit whose compiler always fails, and one whose compiler makes nothing of the sources


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
    """Its nvcc knows GPUs up to 9.0, and makes an object file that holds nothing but its command line."""
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


@pytest.mark.parametrize(
    ("asked", "complaint"), [("7.0;7.5", "need 8.0 or later"), ("Hopper", "accepted is for example")]
)
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
    """pip's build isolation hides torch."""
    done = build(project, hide_torch=True)
    assert done.returncode == 0 and lines_about_the_extension(done) == []
    assert_pure_python(project)
    done = build(project, hide_torch=True, TINYDROP_CUDA="1")
    assert done.returncode != 0
    assert len(lines_about_the_extension(done)) == 1 and "torch is not there to build against" in done.stderr


def test_bad_wishes_are_refused(project):
    done = build(project, TINYDROP_CUDA="yes")
    assert done.returncode != 0 and "TINYDROP_CUDA: got 'yes', accepted are 0 and 1" in done.stderr


def test_torch_is_no_build_requirement():
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text()).group(1)
    assert "torch" not in requires
