"""Everything is in pyproject.toml, but for the optional CUDA extension, ``tinydrop_kernels._C``.

It is built where torch can be imported and a CUDA toolkit is found, which with pip takes ``--no-build-isolation``.
``TINYDROP_CUDA=0`` forbids it and ``TINYDROP_CUDA=1`` demands it; where it is neither, a failure leaves a package
without it. ``CUDA_HOME`` names the toolkit, ``TORCH_CUDA_ARCH_LIST`` the GPUs, of which those below 8.0 are left out.
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

ARCHITECTURES = "8.0;9.0a;10.0"  # those among them that nvcc knows
OLDEST_ARCHITECTURE = 80
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


def nvcc(home: Path, *arguments: str | Path) -> str:
    """What nvcc prints."""
    done = subprocess.run([home / "bin" / "nvcc", *arguments], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("error|fatal", line)]
        raise CannotBuild(f"nvcc failed: {lines[0] if lines else 'no message'}")
    return done.stdout


def architectures(home: Path) -> list[str]:
    """As nvcc names them: ``["80", "90a", "100"]``; ``"120+PTX"`` is code that later GPUs' drivers can compile too."""
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
    """Without its suffixes."""
    return int(re.match(r"\d+", architecture)[0])


def sources() -> str:
    """A hash of csrc/, which the extension tells as ``SOURCES``: whether it is of the sources at hand."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path("csrc").iterdir()))).hexdigest()[:16]


class BuildCuda(build_ext):
    """Compiles the .cu sources with nvcc, and the rest as setuptools does."""

    def build_extension(self, extension):
        try:
            self.build_cuda(extension)
        except Exception as error:
            if demanded():
                raise SystemExit(f"TINYDROP_CUDA=1, but the CUDA extension did not build: {error}") from None
            print(f"tinydrop_kernels: built without its CUDA extension: {error}", file=sys.stderr)
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # of an earlier build

    def copy_extensions_to_source(self):
        for extension in self.extensions:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)  # where there is no new one
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
        self.force = True  # setuptools looks at the age of module.c alone
        super().build_extension(extension)


def demanded() -> bool:
    wish = os.environ.get("TINYDROP_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"TINYDROP_CUDA: got {wish!r}, expected 0 or 1")
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


def main() -> None:
    found = extensions()
    setup(
        ext_modules=found,
        cmdclass={"build_ext": BuildCuda},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if found else {},
    )


if __name__ == "__main__":  # bench/gpu.sh asks for sources()
    main()
