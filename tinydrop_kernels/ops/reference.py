"""Every operator in plain PyTorch: the baseline, the oracle of the kernels' tests, and the CPU path.

Shared vocabulary (FlashAttention's where it has a word for it):

* ``T`` patch tokens of an image, on a grid of ``(rows, columns)``, numbered in raster order;
* ``indices`` int32 ``(batch, T)``: the kept patches of each image in raster order, then -1 up to ``T``;
* ``counts`` int32 ``(batch,)``: how many are kept; 0 says that the image left early;
* packed tokens ``(total, ...)``: the segments of all images behind one another, no padding. A segment is the prefix
  tokens (class, distillation, registers), the kept patches in raster order, and the summary token if there is one;
* ``cu_seqlens`` int32 ``(batch + 1,)``: where each segment begins, with ``total`` at the end.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A thousandth of a token: forgives the rounding of T * keep in float32, so that a quarter of 196 is 49 and not 50.
ROUNDING_SLACK = 1e-3


def keep_counts(confidence: Tensor, num_patches: int, tau: float | None, gamma: float, min_keep: float) -> Tensor:
    """Number of patch tokens to keep for each image; 0 where the image exits.

    ``keep(c) = clamp(1 - (c / tau) ** gamma, min_keep, 1)`` and ``count = ceil(num_patches * keep)``. With
    ``tau=None`` nothing exits and 1 stands for tau in the law. An image without a confidence (NaN) does not exit and
    keeps everything. The behaviour is that of TinyDrop (arXiv 2509.03379, section 3); the formula is ours.

    Args:
        confidence: float32 ``(batch,)`` in [0, 1].
        num_patches: patch tokens of one image.
        tau: exit threshold in (0, 1], or None.
        gamma: curvature >= 0; 0 keeps ``min_keep`` whatever the confidence, infinity keeps everything.
        min_keep: least fraction kept, in (0, 1].

    Returns:
        int32 ``(batch,)``.
    """
    # NaN ** 0 and 1 ** inf are 1 in floating point, where the law asks for everything to be kept
    ratio = confidence / (1.0 if tau is None else tau)
    drop = torch.zeros_like(ratio) if math.isinf(gamma) else ratio**gamma
    keep = (1.0 - drop).clamp(min_keep, 1.0).masked_fill(confidence.isnan(), 1.0)
    counts = (keep * num_patches - ROUNDING_SLACK).ceil().clamp(1, num_patches).int()
    return counts if tau is None else counts.masked_fill(confidence > tau, 0)


def select_tokens(
    logits: Tensor,
    features: Tensor,
    class_weight: Tensor,
    feature_size: tuple[int, int],
    grid_size: tuple[int, int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ops.select_tokens`."""
    weight = class_weight[logits.argmax(dim=1)].float()
    cam = torch.einsum("blc,bc->bl", features.float(), weight).relu()
    return select_from_saliency(logits, cam.view(-1, *feature_size), grid_size, tau, gamma, min_keep, normalise)


def select_from_saliency(
    logits: Tensor,
    saliency: Tensor,
    grid_size: tuple[int, int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    normalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ops.select_from_saliency`."""
    confidence = logits.float().softmax(dim=1).amax(dim=1)
    num_patches = grid_size[0] * grid_size[1]
    counts = keep_counts(confidence, num_patches, tau, gamma, min_keep)
    resized = F.interpolate(saliency.float()[:, None], size=grid_size, mode="bilinear", align_corners=False)[:, 0]

    scores = resized.flatten(1)
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(num_patches, device=scores.device)
    kept_first = torch.where(places < counts[:, None], order, num_patches).sort(dim=1).values
    indices = kept_first.masked_fill(kept_first == num_patches, -1).int()
    return indices, counts, confidence, _normalised(resized, saliency.float()) if normalise else resized


def _normalised(resized: Tensor, saliency: Tensor) -> Tensor:
    """``(resized - min) / (max - min)`` of each image, where min and max are those of the map's finite cells."""
    finite = saliency.isfinite()
    low = saliency.masked_fill(~finite, float("inf")).amin(dim=(1, 2), keepdim=True)
    high = saliency.masked_fill(~finite, float("-inf")).amax(dim=(1, 2), keepdim=True)
    share = (resized.clamp(low, high) - low) / (high - low)
    return share.masked_fill((low >= high) & ~resized.isnan(), 0.0)


def pack(counts: Tensor, num_patches: int, num_prefix_tokens: int, summary: bool) -> tuple[Tensor, Tensor]:
    """See :func:`ops.pack`."""
    stays = counts > 0
    seqlens = counts + stays * num_prefix_tokens
    if summary:
        seqlens = seqlens + (stays & (counts < num_patches))
    cu_seqlens = F.pad(seqlens.cumsum(dim=0, dtype=torch.int32), (1, 0))
    return cu_seqlens, torch.stack((seqlens.amax().int(), cu_seqlens[-1]))


def embed_tokens(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    summary: bool,
) -> Tensor:
    """See :func:`ops.embed_tokens`."""
    patch_height, patch_width = weight.shape[-2:]
    patches = images.unfold(2, patch_height, patch_height).unfold(3, patch_width, patch_width)
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # (batch, rows, columns, channels, patch_height, patch_width), a view
    columns = patches.shape[2]
    kernel = weight.flatten(1)

    image, slot, patch = _kept(indices)
    kept = F.linear(patches[image, patch // columns, patch % columns].flatten(1), kernel, bias)
    if pos_embed is not None:
        kept = kept + pos_embed[patch]
    mean = None
    if summary:
        share = _dropped_share(indices).to(images.dtype)
        pixels = torch.einsum("bt,btp->bp", share, patches.flatten(3).flatten(1, 2))
        mean = F.linear(pixels, kernel, bias)
        if pos_embed is not None:
            mean = mean + share.to(pos_embed.dtype) @ pos_embed
    return _packed(kept, image, slot, prefix, mean, indices, cu_seqlens, total)


def gather_tokens(
    tokens: Tensor,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    summary: bool,
) -> Tensor:
    """See :func:`ops.gather_tokens`."""
    image, slot, patch = _kept(indices)
    kept = tokens[image, patch]
    mean = torch.einsum("bt,btd->bd", _dropped_share(indices).to(tokens.dtype), tokens) if summary else None
    if pos_embed is not None:
        kept = kept + pos_embed[patch]
        mean = mean + _dropped_share(indices).to(pos_embed.dtype) @ pos_embed if mean is not None else None
    return _packed(kept, image, slot, prefix, mean, indices, cu_seqlens, total)


def _kept(indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image, place among the kept, and patch number of every kept patch, in packed order: int64 ``(kept,)`` each."""
    image, slot = (indices >= 0).nonzero(as_tuple=True)
    return image, slot, indices[image, slot].long()


def _dropped_share(indices: Tensor) -> Tensor:
    """float32 ``(batch, T)``: 1 / (number of dropped patches) at each dropped patch, 0 at each kept one."""
    dropped = torch.ones(indices.shape[0], indices.shape[1] + 1, device=indices.device)
    dropped.scatter_(1, torch.where(indices >= 0, indices, indices.shape[1]).long(), 0.0)
    dropped = dropped[:, :-1]
    return dropped / dropped.sum(dim=1, keepdim=True).clamp(min=1)


def _packed(kept, image, slot, prefix, mean, indices, cu_seqlens, total) -> Tensor:
    """Put kept patches ``(kept, dim)``, prefix rows and, if given, summary rows ``(batch, dim)`` in their places."""
    num_patches = indices.shape[1]
    num_prefix_tokens = prefix.shape[-2]
    starts = cu_seqlens[:-1].long()
    counts = (indices >= 0).sum(dim=1)
    out = kept.new_empty(total, kept.shape[1])
    out[starts[image] + num_prefix_tokens + slot] = kept
    staying = (counts > 0).nonzero()[:, 0]
    if num_prefix_tokens:
        rows = prefix.expand(len(indices), -1, -1)[staying].to(out.dtype)
        out[starts[staying, None] + torch.arange(num_prefix_tokens, device=out.device)] = rows
    if mean is not None:
        thinned = ((counts > 0) & (counts < num_patches)).nonzero()[:, 0]
        out[starts[thinned] + num_prefix_tokens + counts[thinned]] = mean[thinned].to(out.dtype)
    return out


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    bias_table: Tensor | None = None,
    positions: Tensor | None = None,
    grid_size: tuple[int, int] = (1, 1),
) -> Tensor:
    """See :func:`ops.varlen_attention`; the last three arguments are the fields of its ``bias``.

    On CPU one ``scaled_dot_product_attention`` a segment, which was the fastest of what was measured
    (docs/decisions.md). Elsewhere that would read the lengths back in every layer, so there the segments are padded.
    """
    bias = None if bias_table is None else (bias_table, positions, grid_size)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    attend = segment_attention if query.device.type == "cpu" else padded_attention
    return attend(query, key, value, *lengths, scale, bias)


def segment_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, bias):
    """One ``scaled_dot_product_attention`` a segment; ``bias`` is the fields of :class:`ops.RelativeBias`, or None."""
    out = query.new_empty(query.shape)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        if q1 - q0 > max_seqlen_q or k1 - k0 > max_seqlen_k:  # here it is seen; the kernels take the caller's word
            raise ValueError(f"max_seqlen: got {max_seqlen_q}, {max_seqlen_k}, one segment has {q1 - q0}, {k1 - k0}")
        if k1 == k0:
            out[q0:q1] = 0
        elif q1 > q0:
            q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
            mask = None
            if bias is not None:
                table, positions, grid_size = bias
                index = relative_position_index(positions[q0:q1], positions[k0:k1], grid_size)
                mask = table[index].permute(2, 0, 1)[None].to(q.dtype)
            out[q0:q1] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)
    return out


def padded_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, bias):
    """One ``scaled_dot_product_attention`` of all segments, padded to the longest; reads nothing back."""
    if query.shape[0] == 0 or key.shape[0] == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    rows_q, real_q = _padding(cu_seqlens_q, max_seqlen_q, query.shape[0])
    rows_k, real_k = _padding(cu_seqlens_k, max_seqlen_k, key.shape[0])
    # (batch, longest, heads, head_dim). What stands in the padding is another image's, whose NaN must not come along.
    q = query[rows_q].where(real_q[..., None, None], 0)
    k, v = (t[rows_k].where(real_k[..., None, None], 0) for t in (key, value))
    # A segment without keys attends its padding, so that no row of the softmax is empty, and is zeroed afterwards.
    has_keys = real_k[:, :1]
    mask = (real_k | ~has_keys)[:, None, None]
    if bias is not None:
        table, positions, grid_size = bias
        index = relative_position_index(positions[rows_q], positions[rows_k], grid_size)
        mask = table[index].permute(0, 3, 1, 2).to(q.dtype).masked_fill(~mask, float("-inf"))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    padded = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    padded = padded.where(has_keys[:, :, None, None], 0)
    row = torch.arange(query.shape[0], device=query.device)
    segment = torch.searchsorted(cu_seqlens_q[1:], row, right=True).clamp(max=len(cu_seqlens_q) - 2)
    place = (row - cu_seqlens_q[segment]).clamp(max=max_seqlen_q - 1)  # rows behind the last segment get anything
    return padded[segment, place]


def _padding(cu_seqlens: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """Which packed row stands at each place of the padded batch, and whether one does: ``(batch, longest)``."""
    place = torch.arange(longest, device=cu_seqlens.device)
    rows = cu_seqlens[:-1, None] + place
    return rows.clamp(max=total - 1), rows < cu_seqlens[1:, None]


def relative_position_index(positions_q: Tensor, positions_k: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Rows of a relative position table, ``(..., queries, keys)``, for patches ``(..., queries)``, ``(..., keys)``.

    Swin's and BEiT's numbering (``timm.models.beit.gen_relative_position_index``): ``(2 rows - 1)(2 columns - 1)``
    differences of coordinates, row first; then three entries for class token to patch, patch to class token and class
    token to itself. A negative position is the class token.
    """
    rows, columns = grid_size
    differences = (2 * rows - 1) * (2 * columns - 1)
    q, k = positions_q.long()[..., :, None], positions_k.long()[..., None, :]
    down = torch.div(q, columns, rounding_mode="floor") - torch.div(k, columns, rounding_mode="floor")
    right = q % columns - k % columns
    index = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
    index = index.where(q >= 0, differences).where(k >= 0, differences + 1)
    return index.where((q >= 0) | (k >= 0), differences + 2)


def segment_pool(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int = 0) -> Tensor:
    """See :func:`ops.segment_pool`."""
    batch = len(cu_seqlens) - 1
    starts = cu_seqlens[:-1].long() + skip
    lengths = (cu_seqlens[1:] - starts).clamp(min=0)
    empty = (lengths == 0)[:, None]
    if mode == "first":
        rows = tokens[starts.clamp(max=len(tokens) - 1)] if len(tokens) else tokens.new_zeros(batch, tokens.shape[1])
        return rows.masked_fill(empty, 0)
    position = torch.arange(len(tokens), device=tokens.device)
    segment = torch.searchsorted(cu_seqlens[1:], position, right=True)
    inside = position >= starts[segment] if len(tokens) else position.bool()
    segment, tokens = segment[inside], tokens[inside]
    if mode == "mean":
        total = torch.zeros(batch, tokens.shape[1], device=tokens.device).index_add_(0, segment, tokens.float())
        return (total / lengths.clamp(min=1)[:, None]).to(tokens.dtype)
    pooled = tokens.new_full((batch, tokens.shape[1]), float("-inf"))
    pooled = pooled.scatter_reduce_(0, segment[:, None].expand_as(tokens), tokens, "amax")
    return pooled.masked_fill(empty, 0)
