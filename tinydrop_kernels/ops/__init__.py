"""The operators: functions from tensors to tensors that know nothing of models and need only torch.

The docstring of each operator is its contract.
"""

from tinydrop_kernels.ops.attention import varlen_attention
from tinydrop_kernels.ops.embed import embed_tokens
from tinydrop_kernels.ops.gather import gather_tokens
from tinydrop_kernels.ops.packing import pack, patch_positions
from tinydrop_kernels.ops.pool import segment_pool
from tinydrop_kernels.ops.registry import OPERATORS, use_backend
from tinydrop_kernels.ops.select import apply_law, select_from_saliency, select_tokens
from tinydrop_kernels.ops.types import Law, Packed, Part, RelativeBias, Saliency, Selection

__all__ = [
    "OPERATORS",
    "Law",
    "Packed",
    "Part",
    "RelativeBias",
    "Saliency",
    "Selection",
    "apply_law",
    "embed_tokens",
    "gather_tokens",
    "pack",
    "patch_positions",
    "segment_pool",
    "select_from_saliency",
    "select_tokens",
    "use_backend",
    "varlen_attention",
]
