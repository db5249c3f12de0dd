"""Exit, which grid, how many patches, and which: from the guidance model's output to kept indices."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydrop_kernels.ops.registry import define, kernels, reference, triton
from tinydrop_kernels.ops.saliency import saliency_map, top_classes
from tinydrop_kernels.ops.types import ROUNDING_SLACK, Grid, Law, Saliency, Selection

Grids = Sequence[Grid]
PLAIN_CAM = Saliency()


def select_tokens(
    logits: Tensor,
    features: Tensor,
    class_weight: Tensor,
    feature_size: tuple[int, int],
    grid_sizes: Grids,
    law: Law,
    parts: Saliency = PLAIN_CAM,
) -> Selection:
    """Decide, from the guidance model's output, which images exit, and the grid and the patches of the others.

    Closed-form Grad-CAM: where the head is linear after average pooling, the gradient of a logit with respect to the
    last feature map is that class's row of the head, so the activation of a cell is ``relu(features . class_weight)``
    (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1; the positive factor 1 / cells does not change the ranking).
    Of several classes the rows are summed, weighted by the classes' probabilities over that of the first.

    Args:
        logits: floating ``(batch, classes)``.
        features: floating ``(batch, cells, channels)``, any strides; ``cells = feature_size[0] * feature_size[1]``.
        class_weight: floating ``(classes, channels)``.
        feature_size: rows and columns of the guidance model's feature map.
        grid_sizes: rows and columns of the target's patch grid at each level, dense first, then ever smaller ones.
        law: tau, gamma, min_keep and coarsen; see :func:`apply_law`.
        parts: what makes a cell salient; see :func:`ops.saliency.combine`.
    """
    flat = [side for grid in grid_sizes for side in grid]
    return Selection(*_from_features(logits, features, class_weight, feature_size, flat, *law, *parts))


def select_from_saliency(logits: Tensor, saliency: Tensor, grid_sizes: Grids, law: Law) -> Selection:
    """:func:`select_tokens` from a ready saliency map, ``(batch, rows, columns)`` of any size.

    Each image's map is resized bilinearly (``align_corners=False``, no antialiasing) to its own grid. The ``count``
    patches of highest saliency are kept; ties go to the lower index, and NaN ranks last.
    """
    return Selection(*_from_saliency(logits, saliency, [side for grid in grid_sizes for side in grid], *law))


def apply_law(confidence: Tensor, grid_sizes: Grids, law: Law) -> tuple[Tensor, Tensor]:
    """Number of patches to keep of each image, 0 where it exits, and the level of its grid.

    ``budget = clamp(1 - (c / tau) ** gamma, min_keep, 1)`` is the fraction of the dense patches to be spent. The grid
    is the level whose side is nearest to ``budget ** (coarsen / 2)`` of the dense side, of which the fraction
    ``budget ** (1 - coarsen)`` is kept: ``count = ceil(patches * fraction)``. So ``coarsen=0`` drops alone and
    ``coarsen=1`` is resolution alone. An image without a confidence (NaN) does not exit and keeps everything.

    Source: the budget behaves as TinyDrop's (arXiv 2509.03379, section 3); the formulas are ours.

    Args:
        confidence: float32 ``(batch,)`` in [0, 1].
        grid_sizes: as in :func:`select_tokens`.
        law: ``gamma=0`` spends ``min_keep`` whatever the confidence, ``gamma=inf`` spends everything.

    Returns:
        counts and levels, int32 ``(batch,)``.
    """
    tau, gamma, min_keep, coarsen = law
    # NaN ** 0 and 1 ** inf are 1 in floating point, where the law asks for everything to be kept
    ratio = confidence / (1.0 if tau is None else tau)
    drop = torch.zeros_like(ratio) if math.isinf(gamma) else ratio**gamma
    budget = (1.0 - drop).clamp(min_keep, 1.0).masked_fill(confidence.isnan(), 1.0)
    sizes = [rows * columns for rows, columns in grid_sizes]
    sides = [math.sqrt(size / sizes[0]) for size in sizes]
    scale = budget ** (coarsen / 2)
    levels = torch.zeros_like(scale, dtype=torch.int32)
    for side, smaller in pairwise(sides):
        levels += scale < (side + smaller) / 2
    patches = torch.tensor(sizes, device=confidence.device)[levels.long()]
    counts = (budget ** (1.0 - coarsen) * patches - ROUNDING_SLACK).ceil().clamp(min=1).minimum(patches).int()
    return (counts if tau is None else counts.masked_fill(confidence > tau, 0)), levels


def _reference_from_features(
    logits: Tensor,
    features: Tensor,
    class_weight: Tensor,
    feature_size: Sequence[int],
    grid_sizes: Sequence[int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    coarsen: float,
    classes: int,
    norm: float,
    centre: float,
) -> tuple[Tensor, ...]:
    index, share = top_classes(logits, classes)
    weight = torch.einsum("bk,bkc->bc", share, class_weight[index].float())
    saliency = saliency_map(weight[:, None], features, feature_size, Saliency(classes, norm, centre))
    return _reference_from_saliency(logits, saliency, grid_sizes, tau, gamma, min_keep, coarsen)


def _reference_from_saliency(
    logits: Tensor,
    saliency: Tensor,
    grid_sizes: Sequence[int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    coarsen: float,
) -> tuple[Tensor, ...]:
    grids = list(zip(grid_sizes[::2], grid_sizes[1::2], strict=True))
    confidence = logits.float().softmax(dim=1).amax(dim=1)
    counts, levels = apply_law(confidence, grids, Law(tau, gamma, min_keep, coarsen))
    selection = empty_selection(logits, grid_sizes)
    indices, scores = selection[0].fill_(-1), selection[4].fill_(0)
    in_use = sorted(set(levels.tolist()))
    for level in in_use:
        rows, columns = grids[level]
        # Where all images share a grid, and a policy that only drops sees to that, nothing need be gathered.
        images = (levels == level).nonzero()[:, 0] if len(in_use) > 1 else slice(None)
        maps = saliency[images].float()[:, None]
        resized = F.interpolate(maps, size=(rows, columns), mode="bilinear", align_corners=False)[:, 0].flatten(1)
        order = resized.masked_fill(resized.isnan(), float("-inf")).sort(dim=1, descending=True, stable=True).indices
        patches = rows * columns
        places = torch.arange(patches, device=order.device)
        kept_first = torch.where(places < counts[images, None], order, patches).sort(dim=1).values
        indices[images, :patches] = kept_first.masked_fill(kept_first == patches, -1).int()
        scores[images, :patches] = resized
    return indices, counts, levels, confidence, scores


def empty_selection(logits: Tensor, grid_sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Indices, counts, levels, confidence and saliency, yet to be written; ``grid_sizes`` as the schema has them."""
    batch, patches = logits.shape[0], grid_sizes[0] * grid_sizes[1]
    return (
        logits.new_empty(batch, patches, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.float32),
        logits.new_empty(batch, patches, dtype=torch.float32),
    )


def _triton_from_features(*arguments: Any) -> tuple[Tensor, ...]:
    logits, grid_sizes = arguments[0], arguments[4]
    launch = kernels("select").launch
    return launch(empty_selection(logits, grid_sizes), *arguments)  # type: ignore[no-any-return]


def _triton_from_saliency(*arguments: Any) -> tuple[Tensor, ...]:
    logits, _, grid_sizes, *_ = arguments
    launch = kernels("select_from_saliency").launch
    return launch(empty_selection(logits, grid_sizes), *arguments)  # type: ignore[no-any-return]


_LAW = "float? tau, float gamma, float min_keep, float coarsen"
_RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_from_features = define(
    "select_tokens(Tensor logits, Tensor features, Tensor class_weight, SymInt[2] feature_size, SymInt[] grid_sizes, "
    f"{_LAW}, int classes, float norm, float centre) -> {_RESULT}",
    lambda logits, features, class_weight, feature_size, grid_sizes, *others: empty_selection(logits, grid_sizes),
    [triton(_triton_from_features), reference(_reference_from_features)],
)
_from_saliency = define(
    f"select_from_saliency(Tensor logits, Tensor saliency, SymInt[] grid_sizes, {_LAW}) -> {_RESULT}",
    lambda logits, saliency, grid_sizes, *others: empty_selection(logits, grid_sizes),
    [triton(_triton_from_saliency), reference(_reference_from_saliency)],
)
