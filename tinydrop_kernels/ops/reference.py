"""Every operator in plain PyTorch: the baseline, the oracle of the kernels' tests, and the CPU path.

Shared vocabulary (FlashAttention's where it has a word for it):

* ``T`` patch tokens of an image, on a grid of ``(rows, columns)``, numbered in raster order;
* ``indices`` int32 ``(batch, T)``: the kept patches of each image in raster order, then -1 up to ``T``;
* ``counts`` int32 ``(batch,)``: how many are kept; 0 says that the image left early;
* packed tokens ``(total, ...)``: the segments of all images behind one another, no padding. A segment is the prefix
  tokens (class, distillation, registers), the kept patches in raster order, and the summary token if there is one;
* ``cu_seqlens`` int32 ``(batch + 1,)``: where each segment begins, with ``total`` at the end.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# A thousandth of a token: forgives the rounding of T * keep in float32, so that a quarter of 196 is 49 and not 50.
ROUNDING_SLACK = 1e-3


class Selection(NamedTuple):
    """What ``select_tokens`` decided for a batch."""

    indices: Tensor  # int32 (batch, T): kept patches in raster order, then -1
    counts: Tensor  # int32 (batch,): number of kept patches, 0 for an image that exits
    confidence: Tensor  # float32 (batch,): max softmax of the guidance logits
    saliency: Tensor  # float32 (batch, rows, columns): what the ranking was made on


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
    keep = 1.0 - (confidence / (1.0 if tau is None else tau)) ** gamma
    keep = keep.nan_to_num(nan=1.0).clamp(min_keep, 1.0)
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
) -> Selection:
    """Decide, from the guidance model's output, which images exit and which patches of the others are kept.

    Closed-form Grad-CAM: where the head is linear after average pooling, the gradient of a logit with respect to the
    last feature map is that class's row of the head, so the saliency of a cell is ``relu(features . class_weight)``
    (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1; the positive factor 1 / cells does not change the ranking).

    Args:
        logits: floating ``(batch, classes)``.
        features: floating ``(batch, cells, channels)``, any strides; ``cells = feature_size[0] * feature_size[1]``.
        class_weight: floating ``(classes, channels)``.
        feature_size: rows and columns of the guidance model's feature map.
        grid_size: rows and columns of the target's patch grid.
        tau, gamma, min_keep: see :func:`keep_counts`.
    """
    weight = class_weight[logits.argmax(dim=1)].float()
    cam = torch.einsum("blc,bc->bl", features.float(), weight).relu()
    return select_from_saliency(logits, cam.view(-1, *feature_size), grid_size, tau, gamma, min_keep)


def select_from_saliency(
    logits: Tensor, saliency: Tensor, grid_size: tuple[int, int], tau: float | None, gamma: float, min_keep: float
) -> Selection:
    """:func:`select_tokens` from a ready saliency map, ``(batch, rows, columns)`` of any size.

    The map is resized bilinearly (``align_corners=False``, no antialiasing) to ``grid_size``. The ``count`` patches of
    highest saliency are kept; ties go to the lower index, and NaN ranks last.
    """
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
    return Selection(indices, counts, confidence, resized)


def pack(counts: Tensor, num_patches: int, num_prefix_tokens: int, summary: bool) -> tuple[Tensor, int, int]:
    """Lay the kept tokens of a batch behind one another.

    Reads two numbers back from the device, in one copy: the only synchronisation of a batch.

    Args:
        counts: int32 ``(batch,)``, ``batch >= 1``.
        num_patches: patch tokens of one image.
        num_prefix_tokens: rows that every image that does not exit brings in front of its patches.
        summary: one more row for the dropped patches, where there are any.

    Returns:
        ``cu_seqlens`` int32 ``(batch + 1,)``, ``max_seqlen`` and ``total``.
    """
    stays = counts > 0
    seqlens = counts + stays * num_prefix_tokens
    if summary:
        seqlens = seqlens + (stays & (counts < num_patches))
    cu_seqlens = F.pad(seqlens.cumsum(dim=0, dtype=torch.int32), (1, 0))
    max_seqlen, total = torch.stack((seqlens.amax(), cu_seqlens[-1])).tolist()
    return cu_seqlens, max_seqlen, total


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
    """Packed tokens straight from pixels: the patch embedding of the kept patches only.

    The patch embedding is a convolution whose stride is its kernel, hence linear in the pixels of one patch. The
    summary token is the mean of the dropped patches' embeddings, positions included; being linear, it is computed as
    the embedding of their mean pixels plus the mean of their positional embeddings.

    Args:
        images: floating ``(batch, channels, height, width)``, any strides. Pixels beyond the last whole patch are not
            used, as in the convolution.
        weight: ``(dim, channels, patch_height, patch_width)``.
        bias: ``(dim,)`` or None.
        prefix: ``(num_prefix_tokens, dim)``, positions already added; may have no rows.
        pos_embed: ``(T, dim)`` or None.
        indices, cu_seqlens, total: from :func:`select_tokens` and :func:`pack`.
        summary: as given to :func:`pack`.

    Returns:
        ``(total, dim)``.
    """
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
    """Packed tokens from embedded ones: for stems that are no plain patch embedding, and for drops in mid-network.

    Args:
        tokens: patch tokens ``(batch, T, dim)``, any strides.
        prefix: ``(num_prefix_tokens, dim)``, or ``(batch, num_prefix_tokens, dim)`` where they differ by image.
        pos_embed: ``(T, dim)`` to add, or None where it is in ``tokens`` already.
        indices, cu_seqlens, total, summary: as in :func:`embed_tokens`.

    Returns:
        ``(total, dim)``.
    """
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
) -> Tensor:
    """Softmax attention within each segment; segments do not see one another.

    An empty segment has no rows; queries of a segment without keys yield zeros. On CPU, one
    ``scaled_dot_product_attention`` a segment is the fastest that was measured (docs/decisions.md).

    Args:
        query: ``(total_q, heads, head_dim)``, any strides.
        key, value: ``(total_k, heads, head_dim)``, any strides.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``.
        max_seqlen_q, max_seqlen_k: longest segment.
        scale: factor on the scores, ``head_dim ** -0.5`` by default.

    Returns:
        ``(total_q, heads, head_dim)``, contiguous.
    """
    out = query.new_empty(query.shape)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        if k1 == k0:
            out[q0:q1] = 0
        elif q1 > q0:
            q, k, v = (t.transpose(0, 1)[None] for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
            out[q0:q1] = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    return out


def segment_pool(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int = 0) -> Tensor:
    """Reduce each segment to one row.

    Args:
        tokens: ``(total, dim)``.
        cu_seqlens: int32 ``(batch + 1,)``.
        mode: ``"first"``, ``"mean"`` or ``"max"``.
        skip: rows at the head of each segment that do not take part.

    Returns:
        ``(batch, dim)``; zeros for a segment with no rows left. Means are accumulated in float32.
    """
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
    if mode == "max":
        pooled = tokens.new_full((batch, tokens.shape[1]), float("-inf"))
        pooled = pooled.scatter_reduce_(0, segment[:, None].expand_as(tokens), tokens, "amax")
        return pooled.masked_fill(empty, 0)
    raise ValueError(f"mode: got {mode!r}, accepted are 'first', 'mean' and 'max'")
