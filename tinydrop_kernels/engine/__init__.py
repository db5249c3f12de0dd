"""What a patched model does when it is called."""

from tinydrop_kernels.engine.pipeline import Pipeline
from tinydrop_kernels.engine.tinydrop import TinyDrop

__all__ = ["Pipeline", "TinyDrop"]
