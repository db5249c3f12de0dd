"""The saliency of the cells of the guidance model's feature map, in plain PyTorch."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import Saliency


def top_classes(logits: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the most probable classes and the ratio of their probabilities to that of the first class.

    Among equal logits the lower class comes first.

    Args:
        logits: floating ``(batch, num_classes)``.
        classes: number of classes to return. If there are fewer, all are returned.

    Returns:
        indices int64 and ratios float32, both ``(batch, min(classes, num_classes))``.
    """
    if classes == 1:
        index = logits.argmax(dim=1, keepdim=True)
        return index, torch.ones_like(index, dtype=torch.float32)
    ordered = logits.float().sort(dim=1, descending=True, stable=True)
    logit, index = ordered.values[:, :classes], ordered.indices[:, :classes]
    first = logit[:, :1]
    return index, torch.where(logit == first, 1.0, (logit - first).exp())


def saliency_map(gradient: Tensor, cells: Tensor, size: Sequence[int], saliency: Saliency) -> Tensor:
    """Return ``relu(cells . mean gradient)``, combined with the other parts of the saliency (:func:`combine`).

    Args:
        gradient: floating ``(batch, cells, channels)``, or ``(batch, 1, channels)`` if it is the same in all cells.
        cells: floating ``(batch, cells, channels)``.
        size: rows and columns of the map.
        saliency: the weights of the parts.

    Returns:
        float32 ``(batch, rows, columns)``.
    """
    device_type = cells.device.type
    without = torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
    with without:
        cells = cells.float()
        weight = gradient.float() if gradient.shape[1] == 1 else gradient.float().mean(dim=1, keepdim=True)
        # Multiply a row by the cells, because on CPU this is twice as fast as the cells times a column.
        cam = torch.bmm(weight, cells.transpose(1, 2)).relu().view(-1, *size)
        norm = torch.linalg.vector_norm(cells, dim=2).view(-1, *size) if saliency.norm else None
        return combine(cam, norm, saliency)


def combine(cam: Tensor, norm: Tensor | None, saliency: Saliency) -> Tensor:
    """Return ``unit(cam) + norm_weight * unit(norm) + center_weight * closeness``, or ``cam`` if both weights are 0.

    :func:`unit` scales each image's map to [0, 1]. Grad-CAM shows where a class is. The norm of the features and the
    closeness to the center are less noisy and show where any object is (measurements: docs/accuracy.md).

    Args:
        cam: float32 ``(batch, rows, columns)``, a class activation map.
        norm: float32 of the same shape, the norm of each cell's features; None if its weight is 0.
        saliency: the weights of the parts.

    Returns:
        float32 ``(batch, rows, columns)``.
    """
    if not (saliency.norm or saliency.center):
        return cam
    combined = unit(cam)
    if norm is not None and saliency.norm:
        combined = combined + saliency.norm * unit(norm)
    if saliency.center:
        combined = combined + saliency.center * closeness(cam.shape[1], cam.shape[2], cam.device)
    return combined


def unit(maps: Tensor) -> Tensor:
    """Scale each image's map to [0, 1]: ``(x - min) / (max - min)``, with ``min`` and ``max`` over its finite cells.

    Infinite cells are clamped to that range and NaN stays NaN. A map whose finite cells are all equal becomes 0.

    Args:
        maps: float32 ``(batch, rows, columns)``.
    """
    finite = maps.isfinite()
    low = maps.masked_fill(~finite, float("inf")).amin(dim=(1, 2), keepdim=True)
    high = maps.masked_fill(~finite, float("-inf")).amax(dim=(1, 2), keepdim=True)
    share = (maps.clamp(low, high) - low) / (high - low)
    return share.masked_fill((low >= high) & ~maps.isnan(), 0.0)


def closeness(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return each cell's closeness to the center of the map, ``1 - d / d_max``: float32 ``(rows, columns)``.

    ``d`` is the distance of the cell's middle from the map's middle, if the map's sides have length 1. ``d_max`` is the
    distance of a corner cell.
    """
    down = (torch.arange(rows, device=device) + 0.5) / rows - 0.5
    right = (torch.arange(columns, device=device) + 0.5) / columns - 0.5
    distance = (down[:, None] ** 2 + right**2).sqrt()
    return 1 - distance / distance[0, 0] if rows * columns > 1 else torch.ones(1, 1, device=device)
