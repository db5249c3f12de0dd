"""The oracle for attention in float64, written from the contract; it shares no code with the package."""

import torch


def exact(query, key, value, seqlens_q, seqlens_k, scale=None, bias=None, skip_keys=0):
    """Compute attention in float64 on the CPU, segment by segment, straight from its formula."""
    query, key, value = (t.double().cpu() for t in (query, key, value))
    scale = query.shape[2] ** -0.5 if scale is None else scale
    out = query.new_zeros(query.shape)
    q0 = k0 = 0
    for rows, keys in zip(seqlens_q, seqlens_k, strict=True):
        q, k, v = query[q0 : q0 + rows], key[k0 : k0 + keys][skip_keys:], value[k0 : k0 + keys][skip_keys:]
        scores = scale * torch.einsum("qhd,khd->hqk", q, k)
        if bias is not None:
            scores += exact_bias(*bias, slice(q0, q0 + rows))
        out[q0 : q0 + rows] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1) if len(k) else scores, v)
        q0, k0 = q0 + rows, k0 + keys
    return out


def exact_bias(table, positions, grid_size, segment):
    """Return a segment's bias ``(heads, n, n)``, by BEiT's numbering (timm's ``gen_relative_position_index``)."""
    rows, columns = grid_size
    p = positions[segment].long().cpu()
    dy, dx = (p // columns)[:, None] - (p // columns), (p % columns)[:, None] - (p % columns)
    index = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    of_class = p < 0
    index[of_class] = len(table) - 3
    index[:, of_class] = len(table) - 2
    index[of_class[:, None] & of_class] = len(table) - 1
    return table.double().cpu()[index].permute(2, 0, 1)
