"""The build of the optional CUDA extension, ``tinydrop_kernels._C``. All other settings are in pyproject.toml.

The extension is built if torch and a CUDA toolkit are found. With pip, torch is found only with
``--no-build-isolation``. Environment variables:

* ``TINYDROP_CUDA``: ``0`` never builds the extension; ``1`` fails if it cannot be built. By default a failure leaves a
  package without the extension.
* ``CUDA_HOME``: the folder of the CUDA toolkit.
* ``TORCH_CUDA_ARCH_LIST``: the GPU architectures. Those below 8.0 are left out.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = "8.0;9.0a;10.0"  # the default; those that nvcc does not know are left out
OLDEST_ARCHITECTURE = 80
OLDEST_TORCH = "0x020b000000000000"  # 2.11; every later torch keeps its stable ABI
OLDEST_PYTHON = "0x030a0000"


class CannotBuild(Exception):
    """The reason why the CUDA extension cannot be built, in one line."""


def torch_folder() -> Path:
    """Return the folder where torch is installed. torch is not imported; only its headers and libraries are needed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuild("torch is not found (pip hides torch unless --no-build-isolation is given)")
    return Path(spec.origin).parent


def cuda_home() -> Path:
    """Return the CUDA toolkit's folder: ``CUDA_HOME`` if set, otherwise where nvcc is, otherwise the usual folder."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        candidates = [named]
    else:
        candidates = ["/usr/local/cuda"]
        if nvcc := shutil.which("nvcc"):  # ask nvcc for its folder, because it may be a wrapper or a link
            answer = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
            candidates = [str(Path(here).parent) for here in re.findall("_HERE_=(.*)", answer.stderr)] + candidates
    for folder in map(Path, candidates):
        if (folder / "bin" / "nvcc").is_file() and (folder / "include" / "cuda_runtime.h").is_file():
            return folder
    raise CannotBuild(f"no CUDA toolkit in {' or '.join(candidates)} (set CUDA_HOME to name another folder)")


def static_runtime(home: Path) -> Path:
    for file in (home / folder / "libcudart_static.a" for folder in ("lib64", "lib", "targets/x86_64-linux/lib")):
        if file.is_file():
            return file
    raise CannotBuild(f"no libcudart_static.a in {home}")


def nvcc(home: Path, *arguments: str | Path) -> str:
    """Run nvcc and return what it prints."""
    done = subprocess.run([home / "bin" / "nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("error|fatal", line)]
        raise CannotBuild(f"nvcc failed: {lines[0] if lines else 'no message'}")
    return done.stdout


def architectures(home: Path) -> list[str]:
    """Return the architectures to build for, as nvcc names them: ``["80", "90a", "100"]``.

    ``"120+PTX"`` adds code that the drivers of later GPUs can compile.
    """
    asked = (os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES).replace(" ", ";").split(";")
    names = [name.replace(".", "") for name in asked if name]
    if not names or not all(re.fullmatch(r"\d{2,3}[af]?(\+PTX)?", name) for name in names):
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: got {';'.join(asked)!r}, expected for example {ARCHITECTURES!r}")
    names = [name for name in names if number(name) >= OLDEST_ARCHITECTURE]
    if not names:
        raise CannotBuild(f"TORCH_CUDA_ARCH_LIST: got {';'.join(asked)!r}, the kernels need 8.0 or later")
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = {number(code.removeprefix("sm_")) for code in nvcc(home, "--list-gpu-code").split()}
        names = [name for name in names if number(name) in known]
    return names


def number(architecture: str) -> int:
    """Return an architecture's number without its suffixes."""
    return int(re.match(r"\d+", architecture)[0])


def sources() -> str:
    """Return a hash of csrc/. The extension holds it as ``SOURCES``, so that a stale build can be recognised."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path("csrc").iterdir()))).hexdigest()[:16]


class BuildCuda(build_ext):
    """A build command that compiles the .cu sources with nvcc, and everything else as setuptools does."""

    def build_extension(self, extension):
        try:
            self.build_cuda(extension)
        except Exception as error:
            if demanded():
                raise SystemExit(f"TINYDROP_CUDA=1, but the CUDA extension did not build: {error}") from None
            print(f"tinydrop_kernels: built without its CUDA extension: {error}", file=sys.stderr)
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # remove a stale library

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)  # in case there is no new one
        super().copy_extensions_to_source()

    def build_cuda(self, extension):
        home, torch = cuda_home(), torch_folder()
        names = architectures(home)
        target = Path(self.build_temp) / "varlen_attention.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        options += [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-Icsrc", f"-isystem={torch / 'include'}"]
        for name in names:
            code = name.removesuffix("+PTX")
            options.append(f"-gencode=arch=compute_{code},code=sm_{code}")
            if code != name:
                options.append(f"-gencode=arch=compute_{code},code=compute_{code}")
        nvcc(home, "-c", "csrc/varlen_attention.cu", "-o", target, *options)
        extension.define_macros = [
            ("Py_LIMITED_API", OLDEST_PYTHON),
            ("TINYDROP_ARCHITECTURES", f'"{";".join(names)}"'),
            ("TINYDROP_SOURCES", f'"{sources()}"'),
        ]
        extension.extra_objects = [str(target), str(static_runtime(home))]
        extension.library_dirs = [str(torch / "lib")]
        self.force = True  # otherwise setuptools rebuilds only if module.c has changed
        super().build_extension(extension)


def demanded() -> bool:
    wish = os.environ.get("TINYDROP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TINYDROP_CUDA: got {wish!r}, expected 0 or 1")
    return wish == "1"


def extensions() -> list[Extension]:
    """Return the CUDA extension if it is demanded, or if it is possible and not forbidden; otherwise an empty list."""
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


def main() -> None:
    found = extensions()
    setup(
        ext_modules=found,
        cmdclass={"build_ext": BuildCuda},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
    )


if __name__ == "__main__":  # bench/gpu.sh asks for sources()
    main()
