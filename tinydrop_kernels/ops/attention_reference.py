"""Attention within segments by PyTorch's own ``scaled_dot_product_attention``, in two variants.

:func:`attend_segments` reads the segment lengths back to the host; :func:`attend_padded` reads nothing back.
"""

from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydrop_kernels.ops.types import RelativeBias

SHORT = 64  # up to this many queries, copying separated segments together is faster than a call for each


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    starts_k: Tensor,
    ends_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    bias: RelativeBias | None,
) -> Tensor:
    """Attend with one ``scaled_dot_product_attention`` call for all segments of equal length.

    Segments of more than ``SHORT`` queries that are not adjacent get a call each. The keys of a segment are the rows
    from its ``starts_k`` up to its ``ends_k``.

    Raises:
        ValueError: a segment is longer than ``max_seqlen_q`` or ``max_seqlen_k``.
    """
    out = query.new_empty(query.shape)
    starts_q = cu_seqlens_q.tolist()
    by_length = defaultdict(list)
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k.tolist(), ends_k.tolist(), strict=False):
        if q1 - q0 > max_seqlen_q or k1 - k0 > max_seqlen_k:  # checked, because the lengths are on the host here
            got, least = f"{max_seqlen_q} and {max_seqlen_k}", f"{q1 - q0} and {k1 - k0}"
            raise ValueError(f"max_seqlen_q, max_seqlen_k: got {got}, expected at least {least}, a segment's lengths")
        if q1 > q0 and k1 <= k0:
            out[q0:q1] = 0
        elif q1 > q0:
            by_length[q1 - q0, k1 - k0].append((q0, k0))
    for (length_q, length_k), starts in by_length.items():
        first_q, first_k = ([start[i] for start in starts] for i in range(2))
        together = length_q <= SHORT or all(map(_is_run, (first_q, first_k), (length_q, length_k)))
        for of_q, of_k in [(first_q, first_k)] if together else [([q], [k]) for q, k in starts]:
            rows_q, rows_k = _rows(of_q, length_q), _rows(of_k, length_k)
            q, k, v = (
                (t[rows] if isinstance(rows, slice) else t.index_select(0, rows))
                .unflatten(0, (len(of_q), -1))
                .transpose(1, 2)
                for t, rows in ((query, rows_q), (key, rows_k), (value, rows_k))
            )
            mask = None
            if bias is not None:
                places = [bias.positions[rows].view(len(of_q), -1) for rows in (rows_q, rows_k)]
                if len(of_q) > 1 and all(bool((place == place[:1]).all()) for place in places):  # e.g. whole windows
                    places = [place[:1] for place in places]
                mask = _looked_up(bias, *places).to(q.dtype)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            rows = attended.transpose(1, 2).flatten(0, 1)
            if len(rows) == len(query):
                return rows.contiguous()
            out[rows_q] = rows
    return out


def _is_run(starts: list[int], length: int) -> bool:
    """Return whether segments of this length are adjacent: each begins where the one before ends."""
    return all(after - before == length for before, after in pairwise(starts))


def _rows(starts: list[int], length: int) -> slice | Tensor:
    """Return the rows of segments of this length: a slice if the segments are adjacent, otherwise an index tensor."""
    if _is_run(starts, length):
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten()


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    starts_k: Tensor,
    ends_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    bias: RelativeBias | None,
) -> Tensor:
    """Attend with one ``scaled_dot_product_attention`` call for all segments, padded to the longest.

    Reads nothing back from the device.
    """
    if query.shape[0] == 0 or key.shape[0] == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    rows_q, real_q = _padding(cu_seqlens_q[:-1], cu_seqlens_q[1:], max_seqlen_q, query.shape[0])
    rows_k, real_k = _padding(starts_k, ends_k, max_seqlen_k, key.shape[0])
    # (segments, longest, heads, head_dim). Zero the padding, because its rows belong to other images and a NaN there
    # would spread.
    q = query[rows_q].where(real_q[..., None, None], 0)
    k, v = (t[rows_k].where(real_k[..., None, None], 0) for t in (key, value))
    # A segment without keys attends to its padding, because a softmax over no keys gives NaN. It is zeroed afterwards.
    has_keys = real_k[:, :1]
    mask = (real_k | ~has_keys)[:, None, None]
    if bias is not None:
        added = _looked_up(bias, bias.positions[rows_q], bias.positions[rows_k])
        mask = added.to(q.dtype).masked_fill(~mask, float("-inf"))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    padded = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    padded = padded.where(has_keys[:, :, None, None], 0)
    row = torch.arange(query.shape[0], device=query.device)
    segment = torch.searchsorted(cu_seqlens_q[1:], row, right=True).clamp(max=len(cu_seqlens_q) - 2)
    place = (row - cu_seqlens_q[segment]).clamp(max=max_seqlen_q - 1)  # rows behind the last one are arbitrary
    return padded[segment, place]


def _padding(starts: Tensor, ends: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """Return the packed row at each place of the padded batch, and whether it is real: ``(segments, longest)``."""
    rows = starts[:, None] + torch.arange(longest, device=starts.device)
    return rows.clamp(max=total - 1), rows < ends[:, None]


def _looked_up(bias: RelativeBias, positions_q: Tensor, positions_k: Tensor) -> Tensor:
    """Return the bias ``(n, heads, queries, keys)`` of segments, given patches ``(n, queries)`` and ``(n, keys)``."""
    rows, columns = bias.grid_size
    has_class = len(bias.table) > (2 * rows - 1) * (2 * columns - 1)
    index = relative_position_index(positions_q, positions_k, bias.grid_size, has_class)
    # Look up head by head, in the order in which attention reads the bias, because this is three times as fast as
    # bias.table[index] and makes attention faster as well.
    by_head = bias.table.t().contiguous().index_select(1, index.flatten())
    return by_head.view(-1, *index.shape).transpose(0, 1)


def relative_position_index(
    positions_q: Tensor, positions_k: Tensor, grid_size: tuple[int, int], has_class: bool = True
) -> Tensor:
    """Return the rows of a relative position table for pairs of queries and keys: ``(..., queries, keys)``.

    The numbering is Swin's and BEiT's (``timm.models.beit.gen_relative_position_index``). The table begins with
    ``(2 rows - 1)(2 columns - 1)`` differences of coordinates, row first. Three entries follow: class token to patch,
    patch to class token, and class token to itself.

    Args:
        positions_q, positions_k: patches ``(..., queries)`` and ``(..., keys)``; a negative number is the class token.
        grid_size: rows and columns of the grid.
        has_class: whether negative positions can occur.
    """
    rows, columns = grid_size
    differences = (2 * rows - 1) * (2 * columns - 1)
    # Encode each patch as one number whose differences are those of the coordinates.
    code_q, code_k = (p.long() + p // columns * (columns - 1) for p in (positions_q, positions_k))
    index = (code_q + differences // 2)[..., :, None] - code_k[..., None, :]
    if not has_class:
        return index
    from_class, to_class = (positions_q < 0)[..., :, None], (positions_k < 0)[..., None, :]
    index = index.masked_fill(from_class, differences).masked_fill(to_class, differences + 1)
    return index.masked_fill(from_class & to_class, differences + 2)
