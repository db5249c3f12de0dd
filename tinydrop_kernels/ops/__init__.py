"""The operators. Each has its contract in its docstring; tensors in, tensors out, no models."""

from tinydrop_kernels.ops.backend import choose_backend, use_backend
from tinydrop_kernels.ops.embed_tokens import embed_tokens
from tinydrop_kernels.ops.gather_tokens import gather_tokens
from tinydrop_kernels.ops.library import OPERATORS
from tinydrop_kernels.ops.pack import pack
from tinydrop_kernels.ops.reference import keep_counts
from tinydrop_kernels.ops.segment_pool import segment_pool
from tinydrop_kernels.ops.select_tokens import Selection, select_from_saliency, select_tokens
from tinydrop_kernels.ops.varlen_attention import RelativeBias, varlen_attention, varlen_attention_qkvpacked

__all__ = [
    "OPERATORS",
    "RelativeBias",
    "Selection",
    "choose_backend",
    "embed_tokens",
    "gather_tokens",
    "keep_counts",
    "pack",
    "segment_pool",
    "select_from_saliency",
    "select_tokens",
    "use_backend",
    "varlen_attention",
    "varlen_attention_qkvpacked",
]
