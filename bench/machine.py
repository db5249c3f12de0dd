"""Report for bench/gpu.sh: one line ``has NAME`` per available part, then one line with the GPU and all versions."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

import torch

NAMES = ("torch", "triton", "timm", "numpy", "fa3-fwd")
LEAST_TIMM = (1, 0, 31)  # an older timm lacks names that the package imports


def imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:  # a timm that does not fit the installed torchvision raises errors of many types
        return False
    return True


def has_timm() -> bool:
    return imports("timm") and tuple(map(int, metadata.version("timm").split(".")[:3])) >= LEAST_TIMM


def has_extension() -> bool:
    """Return True if the extension is built from the current sources. A stale one would give wrong results."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if not imports("tinydrop_kernels._C"):
        return False
    built, setup = (importlib.import_module(name) for name in ("tinydrop_kernels._C", "setup"))
    return bool(built.SOURCES == setup.sources())


def version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"no {name}"


def card() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"


def main() -> None:
    found = {"gpu": torch.cuda.is_available(), "timm": has_timm(), "extension": has_extension()}
    found |= {name: imports(name) for name in ("pytest_benchmark", "xdist")}
    for name, is_there in found.items():
        if is_there:
            print(f"has {name}")
    print(f"{card()}; {', '.join(map(version, NAMES))}")


if __name__ == "__main__":
    main()
