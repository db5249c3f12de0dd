"""Packed tokens from embedded ones."""

from torch import Tensor

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.backend import wants_gradient
from tinydrop_kernels.ops.library import register


def _fake(tokens, prefix, pos_embed, indices, cu_seqlens, total, summary):
    return tokens.new_empty(total, tokens.shape[2])


_op = register(
    "gather_tokens(Tensor tokens, Tensor prefix, Tensor? pos_embed, Tensor indices, Tensor cu_seqlens, "
    "SymInt total, bool summary) -> Tensor",
    _fake,
    reference.gather_tokens,
)


def gather_tokens(
    tokens: Tensor,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    summary: bool,
) -> Tensor:
    """Packed tokens from embedded ones: for stems that are no plain patch embedding, and for drops in mid-network.

    Args:
        tokens: patch tokens ``(batch, T, dim)``, any strides.
        prefix: ``(num_prefix_tokens, dim)``, or ``(batch, num_prefix_tokens, dim)`` where they differ by image.
        pos_embed: ``(T, dim)`` to add, or None where it is in ``tokens`` already.
        indices, cu_seqlens, total, summary: as in :func:`embed_tokens`.

    Returns:
        ``(total, dim)``.
    """
    arguments = (tokens, prefix, pos_embed, indices, cu_seqlens, total, summary)
    return (reference.gather_tokens if wants_gradient(*arguments[:3]) else _op)(*arguments)
