"""Everything is in pyproject.toml, but for the optional CUDA extension, ``tinydrop_kernels._C``.

It is built where torch can be imported and a CUDA toolkit is found, which with pip takes ``--no-build-isolation``.
``TINYDROP_CUDA=0`` forbids it and ``TINYDROP_CUDA=1`` demands it; where it is neither, a failure leaves a package
without it. ``CUDA_HOME`` names the toolkit, ``TORCH_CUDA_ARCH_LIST`` the GPUs.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = "8.0;9.0a;10.0"
OLDEST_TORCH = "0x020b000000000000"  # 2.11, whose stable ABI every later one keeps
OLDEST_PYTHON = "0x030a0000"


class CannotBuild(Exception):
    """Why there can be no CUDA extension, in one line."""


def torch_folder() -> Path:
    """Where torch is installed; it is not imported, since only its headers and libraries are needed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild("torch is not there to build against (pip hides it without --no-build-isolation)")
    return Path(spec.origin).parent


def cuda_home() -> Path:
    """The toolkit's folder: what ``CUDA_HOME`` names, else where nvcc says it is, else the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [named]
    else:
        candidates = ["/usr/local/cuda"]
        if nvcc := shutil.which("nvcc"):  # perhaps a wrapper or a link, so it is asked
            answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
            candidates = [str(Path(here).parent) for here in re.findall("_HERE_=(.*)", answer.stderr)] + candidates
    for folder in map(Path, candidates):
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file():
            return folder
    raise CannotBuild(f"no CUDA toolkit in {' or '.join(candidates)} (CUDA_HOME names another)")


def static_runtime(home: Path) -> Path:
    for file in (home / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")):
        if file.is_file():
            return file
    raise CannotBuild(f"no libcudart_static.a in {home}")


def architectures() -> list[str]:
    """As nvcc names them: ``["80", "90a", "100"]``."""
    found = (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(" ", ";").split(";")
    names = [name.removesuffix("+PTX").replace(".", "") for name in found if name]
    if not names or not all(re.fullmatch(r"\d{2,3}[af]?", name) for name in names):
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: got {';'.join(found)!r}, accepted is for example {ARCHITECTURES!r}")
    return names


class BuildCuda(build_ext):
    """Compiles the .cu sources with nvcc, and the rest as setuptools does."""

    def build_extension(self, extension):
        try:
            self.build_cuda(extension)
        except Exception as error:
            if demanded():
                raise SystemExit(f"TINYDROP_CUDA=1, but the CUDA extension did not build: {error}") from None
            print(f"tinydrop_kernels: built without its CUDA extension: {error}", file=sys.stderr)

    def build_cuda(self, extension):
        home, torch = cuda_home(), torch_folder()
        target = Path(self.build_temp) / "varlen_attention.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures()]
        command = [home / "bin" / "nvcc", "-c", "csrc/varlen_attention.cu", "-o", target, *codes]
        command += ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-Icsrc", f"-isystem={torch / 'include'}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line] or ["no message"]
            raise CannotBuild(f"nvcc failed: {lines[0]}")
        extension.define_macros = [
            ("Py_LIMITED_API", OLDEST_PYTHON),
            ("TINYDROP_ARCHITECTURES", f'"{";".join(architectures())}"'),
        ]
        extension.extra_objects = [str(target), str(static_runtime(home))]
        extension.library_dirs = [str(torch / "lib")]
        super().build_extension(extension)


def demanded() -> bool:
    wish = os.environ.get("TINYDROP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TINYDROP_CUDA: got {wish!r}, accepted are 0 and 1")
    return wish == "1"


def extensions() -> list[Extension]:
    """The CUDA extension, where it is demanded, or not forbidden and possible."""
    if not demanded():
        if os.environ.get("TINYDROP_CUDA") == "0":
            return []
        try:
            torch_folder()
            cuda_home()
        except CannotBuild:
            return []
    return [
        Extension(
            "tinydrop_kernels._C",
            ["csrc/module.c"],
            libraries=["torch_cpu", "dl", "rt", "pthread"],
            extra_link_args=["-Wl,--exclude-libs,ALL"],
            language="c++",
            py_limited_api=True,
            optional=not demanded(),
        )
    ]


EXTENSIONS = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildCuda},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
