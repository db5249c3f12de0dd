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

__all__ = [
    "Selection",
    "embed_tokens",
    "gather_tokens",
    "keep_counts",
    "pack",
    "segment_pool",
    "select_from_saliency",
    "select_tokens",
    "varlen_attention",
]
