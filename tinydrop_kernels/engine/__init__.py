"""The engine of a patched model, which runs its calls."""

from tinydrop_kernels.engine.pipeline import Pipeline
from tinydrop_kernels.engine.tinydrop import TinyDrop

__all__ = ["Pipeline", "TinyDrop"]
