"""The operators that select: from the guidance model's output to exits, grids and kept patches."""

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
    saliency: Saliency = PLAIN_CAM,
) -> Selection:
    """Decide from the guidance model's output which images exit, and choose the grid and the patches of the others.

    Patches are ranked by Grad-CAM in closed form, without a backward pass. The head must be linear after average
    pooling. The gradient of a logit with respect to the last feature map is then the class's row of the head, and the
    activation of a cell is ``relu(features . class_weight)`` (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1).
    The positive factor 1 / cells is left out, because it does not change the ranking. For several classes the rows are
    summed, each weighted by the ratio of its class's probability to that of the first class.

    Args:
        logits: floating ``(batch, classes)``.
        features: floating ``(batch, cells, channels)``, any strides; ``cells = feature_size[0] * feature_size[1]``.
        class_weight: floating ``(classes, channels)``.
        feature_size: rows and columns of the guidance model's feature map.
        grid_sizes: rows and columns of the target's patch grid at each level, in descending size, dense first.
        law: tau, gamma, min_keep and coarsen; see :func:`apply_law`.
        saliency: the parts of the saliency and their weights; see :func:`ops.saliency.combine`.

    Returns:
        Kept patches, counts, levels, confidence and saliency of each image.

    Example:
        >>> logits, features = torch.zeros(1, 2), torch.tensor([[[1.0], [4.0], [2.0], [3.0]]])  # four cells
        >>> class_weight, law = torch.ones(2, 1), ops.Law(tau=0.9, gamma=0.0, min_keep=0.5)
        >>> ops.select_tokens(logits, features, class_weight, (2, 2), [(2, 2)], law).indices.tolist()
        [[1, 3, -1, -1]]
    """
    flat = [side for grid in grid_sizes for side in grid]
    return Selection(*_from_features(logits, features, class_weight, feature_size, flat, *law, *saliency))


def select_from_saliency(logits: Tensor, saliency: Tensor, grid_sizes: Grids, law: Law) -> Selection:
    """Decide like :func:`select_tokens`, but rank the patches by a given saliency map.

    Each image's map is resized bilinearly (``align_corners=False``, no antialiasing) to its own grid. The ``count``
    patches of highest saliency are kept. Among equal patches the lower index wins, and NaN ranks last.

    Args:
        logits: floating ``(batch, classes)``, for the confidence.
        saliency: floating ``(batch, rows, columns)``, of any size and strides.
        grid_sizes, law: as in :func:`select_tokens`.

    Returns:
        Kept patches, counts, levels, confidence and saliency of each image.

    Example:
        >>> logits, saliency = torch.zeros(1, 2), torch.tensor([[[0.1, 0.9], [0.4, 0.2]]])
        >>> law = ops.Law(tau=0.9, gamma=0.0, min_keep=0.5)
        >>> ops.select_from_saliency(logits, saliency, [(2, 2)], law).indices.tolist()
        [[1, 2, -1, -1]]
    """
    return Selection(*_from_saliency(logits, saliency, [side for grid in grid_sizes for side in grid], *law))


def apply_law(confidence: Tensor, grid_sizes: Grids, law: Law) -> tuple[Tensor, Tensor]:
    """Return for each image the number of patches to keep and the level of its grid. An image that exits keeps 0.

    ``budget = clamp(1 - (c / tau) ** gamma, min_keep, 1)`` is the fraction of the dense patches to spend. The chosen
    level is the one whose side is nearest to ``budget ** (coarsen / 2)`` times the dense side. Of that level's patches,
    ``ceil(patches * budget ** (1 - coarsen))`` are kept. So ``coarsen=0`` only drops patches, and ``coarsen=1`` only
    lowers the resolution. An image whose confidence is NaN does not exit and keeps all dense patches.

    Source: the budget behaves as TinyDrop's (arXiv 2509.03379, section 3); the formulas are ours.

    Args:
        confidence: float32 ``(batch,)`` in [0, 1].
        grid_sizes: as in :func:`select_tokens`.
        law: with ``gamma=0`` the budget is ``min_keep`` at every confidence, with ``gamma=inf`` it is 1.

    Returns:
        counts and levels, int32 ``(batch,)``.

    Example:
        >>> law = ops.Law(tau=0.8, gamma=1.0, min_keep=0.25)
        >>> counts, levels = ops.apply_law(torch.tensor([0.2, 0.7, 0.9]), [(4, 4)], law)
        >>> counts.tolist(), levels.tolist()
        ([12, 4, 0], [0, 0, 0])
    """
    tau, gamma, min_keep, coarsen = law
    sizes = [rows * columns for rows, columns in grid_sizes]
    if gamma == 0 or math.isinf(gamma):  # the same for every confidence
        budget = torch.full_like(confidence, min_keep if gamma == 0 else 1.0)
    else:
        ratio = confidence if tau is None else confidence / tau
        budget = (1.0 - ratio**gamma).clamp_(min_keep, 1.0)
    budget.masked_fill_(confidence.isnan(), 1.0)
    levels = torch.zeros_like(budget, dtype=torch.int32)
    if coarsen == 0:  # a shortcut with the same result as the general case in a quarter of the steps
        patches: Tensor | int = sizes[0]
        kept = budget * patches
    else:
        sides = [math.sqrt(size / sizes[0]) for size in sizes]
        scale = budget ** (coarsen / 2)
        for side, smaller in pairwise(sides):
            levels += scale < (side + smaller) / 2
        patches = torch.tensor(sizes, device=confidence.device)[levels.long()]
        kept = budget ** (1.0 - coarsen) * patches
    counts = (kept - ROUNDING_SLACK).ceil_().clamp_(min=1).clamp_(max=patches).int()
    return (counts if tau is None else counts.masked_fill_(confidence > tau, 0)), levels


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
    center: float,
) -> tuple[Tensor, ...]:
    index, share = top_classes(logits, classes)
    weight = class_weight[index].float()
    if classes > 1:
        weight = torch.bmm(share[:, None], weight)
    saliency = saliency_map(weight, features, feature_size, Saliency(classes, norm, center))
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
    in_use = sorted(set(levels.tolist()))
    if in_use == [0]:  # all images on the dense grid: no gathering or padding needed
        scores = _resized(saliency, grids[0])
        return _most_salient(scores, counts), counts, levels, confidence, scores
    indices, _, _, _, scores = empty_selection(logits, grid_sizes)
    for level in in_use:
        images = (levels == level).nonzero()[:, 0]
        own_scores = _resized(saliency[images], grids[level])
        own_indices = _most_salient(own_scores, counts[images])
        behind = 0, scores.shape[1] - own_scores.shape[1]
        indices[images], scores[images] = F.pad(own_indices, behind, value=-1), F.pad(own_scores, behind)
    return indices, counts, levels, confidence, scores


def _resized(maps: Tensor, size: Grid) -> Tensor:
    resized = F.interpolate(maps.float()[:, None], size=size, mode="bilinear", align_corners=False)
    return resized.flatten(1)


def _most_salient(scores: Tensor, counts: Tensor) -> Tensor:
    """Return the ``counts`` patches of highest score, in raster order, then -1: int32 ``(images, patches)``.

    A patch is kept if its score is at least the ``count``-th highest score. If too many patches have exactly that
    score, those of lower index are kept. This avoids sorting unless the counts differ.
    """
    sizes = counts.tolist()
    fewest, most = min(sizes), max(1, *sizes)
    ranked = scores.nan_to_num(-math.inf, math.inf, -math.inf)
    best = ranked.topk(most, dim=1, sorted=fewest < most).values
    last = best.amin(dim=1) if fewest == most else best.gather(1, counts.long().sub_(1).clamp_(min=0)[:, None])[:, 0]
    kept = ranked >= last[:, None]
    if int(kept.count_nonzero()) > sum(sizes):
        above, equal = ranked > last[:, None], ranked == last[:, None]
        kept = above | (equal & (equal.cumsum(dim=1) <= (counts - above.sum(dim=1))[:, None]))
    patches = kept.nonzero()[:, 1]
    indices = counts.new_full(scores.shape, -1)
    places = torch.arange(scores.shape[1], device=scores.device)
    return indices.masked_scatter_(places < counts[:, None], patches.int())


def empty_selection(logits: Tensor, grid_sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return uninitialised indices, counts, levels, confidence and saliency.

    ``grid_sizes`` is flat, as in the operators' schemas: rows, columns, rows, columns and so on.
    """
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
    launch = kernels("select_tokens").launch
    return launch(empty_selection(logits, grid_sizes), *arguments)  # type: ignore[no-any-return]


def _triton_from_saliency(*arguments: Any) -> tuple[Tensor, ...]:
    logits, _, grid_sizes, *_ = arguments
    launch = kernels("select_from_saliency").launch
    return launch(empty_selection(logits, grid_sizes), *arguments)  # type: ignore[no-any-return]


_LAW = "float? tau, float gamma, float min_keep, float coarsen"
_RESULT = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_from_features = define(
    "select_tokens(Tensor logits, Tensor features, Tensor class_weight, SymInt[2] feature_size, SymInt[] grid_sizes, "
    f"{_LAW}, int classes, float norm, float center) -> {_RESULT}",
    lambda logits, features, class_weight, feature_size, grid_sizes, *others: empty_selection(logits, grid_sizes),
    [triton(_triton_from_features), reference(_reference_from_features)],
)
_from_saliency = define(
    f"select_from_saliency(Tensor logits, Tensor saliency, SymInt[] grid_sizes, {_LAW}) -> {_RESULT}",
    lambda logits, saliency, grid_sizes, *others: empty_selection(logits, grid_sizes),
    [triton(_triton_from_saliency), reference(_reference_from_saliency)],
)
