"""The operators. Each has its contract in its docstring; tensors in, tensors out, no models."""

from tinydrop_kernels.ops.reference import (
    Selection,
    embed_tokens,
    gather_tokens,
    keep_counts,
    pack,
    segment_pool,
    select_from_saliency,
    select_tokens,
)
from tinydrop_kernels.ops.varlen_attention import varlen_attention

OPERATORS = ("select_tokens", "pack", "embed_tokens", "gather_tokens", "varlen_attention", "segment_pool")

__all__ = [
    "OPERATORS",
    "Selection",
    "backend",
    "embed_tokens",
    "gather_tokens",
    "keep_counts",
    "pack",
    "segment_pool",
    "select_from_saliency",
    "select_tokens",
    "varlen_attention",
]


def backend(operator: str, device_type: str) -> tuple[str, str]:
    """Which implementation of an operator runs on a device, and why."""
    if device_type == "cuda":
        return "reference", "plain PyTorch; there is no GPU kernel of it yet"
    return "reference", "plain PyTorch; it is the path for every device but CUDA"
