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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ops.select_tokens`."""
    weight = class_weight[logits.argmax(dim=1)].float()
    cam = torch.einsum("blc,bc->bl", features.float(), weight).relu()
    return select_from_saliency(logits, cam.view(-1, *feature_size), grid_size, tau, gamma, min_keep)


def select_from_saliency(
    logits: Tensor, saliency: Tensor, grid_size: tuple[int, int], tau: float | None, gamma: float, min_keep: float
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
    return indices, counts, confidence, resized


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
) -> Tensor:
    """See :func:`ops.varlen_attention`."""
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
