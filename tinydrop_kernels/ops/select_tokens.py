"""Exit, how many patches, and which: from the guidance model's output to kept indices."""

from typing import NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.library import register


class Selection(NamedTuple):
    """What was decided for a batch; see :mod:`reference` for the vocabulary."""

    indices: Tensor  # int32 (batch, T): kept patches in raster order, then -1
    counts: Tensor  # int32 (batch,): number of kept patches, 0 for an image that exits
    confidence: Tensor  # float32 (batch,): max softmax of the guidance logits
    saliency: Tensor  # float32 (batch, rows, columns): what the ranking was made on, normalised if asked for


def empty_selection(logits: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices, counts, confidence and saliency, yet to be written."""
    batch, (rows, columns) = logits.shape[0], grid_size
    return (
        logits.new_empty(batch, rows * columns, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.int32),
        logits.new_empty(batch, dtype=torch.float32),
        logits.new_empty(batch, rows, columns, dtype=torch.float32),
    )


_from_features = register(
    "select_tokens(Tensor logits, Tensor features, Tensor class_weight, SymInt[2] feature_size, SymInt[2] grid_size, "
    "float? tau, float gamma, float min_keep, bool normalise=False) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, features, class_weight, feature_size, grid_size, *others: empty_selection(logits, grid_size),
    reference.select_tokens,
)
_from_saliency = register(
    "select_from_saliency(Tensor logits, Tensor saliency, SymInt[2] grid_size, float? tau, float gamma, "
    "float min_keep, bool normalise=False) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, saliency, grid_size, *others: empty_selection(logits, grid_size),
    reference.select_from_saliency,
)


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
        normalise: see :func:`select_from_saliency`.
    """
    law = tau, gamma, min_keep
    return Selection(*_from_features(logits, features, class_weight, feature_size, grid_size, *law, normalise))


def select_from_saliency(
    logits: Tensor,
    saliency: Tensor,
    grid_size: tuple[int, int],
    tau: float | None,
    gamma: float,
    min_keep: float,
    normalise: bool = False,
) -> Selection:
    """:func:`select_tokens` from a ready saliency map, ``(batch, rows, columns)`` of any size.

    The map is resized bilinearly (``align_corners=False``, no antialiasing) to ``grid_size``. The ``count`` patches of
    highest saliency are kept; ties go to the lower index, and NaN ranks last.

    ``normalise=True`` returns the saliency in [0, 1]: ``(s - min) / (max - min)``, with the min and max of each image's
    map before the resize, as Grad-CAM implementations do (pytorch-grad-cam's ``scale_cam_image``, less its epsilon).
    They are taken over finite cells; infinities count as the greatest and the least of these, NaN stays NaN, and a map
    of one value is all zeros. The ranking is made before, so that no rounding makes or breaks a tie.
    """
    return Selection(*_from_saliency(logits, saliency, grid_size, tau, gamma, min_keep, normalise))
