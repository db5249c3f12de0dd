"""The oracle for the selection in float64, written from the contract; it shares no code with the package."""

import math

import torch

from .cases import EPS, tolerance

SLACK = 1e-3  # fraction of a patch by which float32 may round a count up


def rank_of(scores: list[float]) -> list[int]:
    """Return the places sorted by falling score; among equal scores the lower place comes first, and NaN comes last."""
    return sorted(range(len(scores)), key=lambda i: math.inf if math.isnan(scores[i]) else -scores[i])


def budget_of(confidence: float, law) -> float:
    if math.isnan(confidence) or law.gamma == math.inf:
        return 1.0
    return min(1.0, max(law.min_keep, 1.0 - (confidence / (law.tau or 1.0)) ** law.gamma))


def level_of(scale: float, grids) -> int:
    """Return the level whose side is nearest to ``scale`` times the dense side."""
    sides = [math.sqrt(rows * columns / (grids[0][0] * grids[0][1])) for rows, columns in grids]
    return min(range(len(grids)), key=lambda level: abs(sides[level] - scale))


def count_of(confidence: float, level: int, grids, law, nudge: float = 0.0) -> int:
    if law.tau is not None and confidence > law.tau:
        return 0
    patches = grids[level][0] * grids[level][1]
    kept = patches * budget_of(confidence, law) ** (1 - law.coarsen)
    return min(patches, max(1, math.ceil(kept - SLACK + nudge)))


def assert_obeys(counts, levels, confidences, grids, law) -> None:
    """Assert counts and levels of float32 confidences; where rounding decides, both neighbours are accepted."""
    for count, level, confidence in zip(counts.tolist(), levels.tolist(), confidences.tolist(), strict=True):
        scale = budget_of(confidence, law) ** (law.coarsen / 2)
        assert level in {level_of(scale + nudge, grids) for nudge in (-1e-5, 1e-5)}, (level, confidence, law)
        nudge = 1e-5 * grids[level][0] * grids[level][1]
        wanted = {count_of(confidence, level, grids, law, n) for n in (-nudge, nudge)}
        assert count in wanted, (count, wanted, confidence, law)


def activation_map(logits, features, class_weight, feature_size, classes: int = 1) -> torch.Tensor:
    """Return Grad-CAM of the most probable classes: float64 ``(batch, rows, columns)``."""
    maps = []
    for row, cells in zip(logits.double().cpu().tolist(), features.double().cpu(), strict=True):
        # Rank NaN first, because torch.argmax does.
        first = rank_of([math.inf if math.isnan(x) else x for x in row])[:classes]
        weight = sum(math.exp(row[c] - row[first[0]]) * class_weight[c].double().cpu() for c in first[1:])
        maps.append((cells @ (class_weight[first[0]].double().cpu() + weight)).relu().view(feature_size))
    return torch.stack(maps)


def unit(values: torch.Tensor) -> torch.Tensor:
    """Return one image's ``(x - min) / (max - min)`` over finite cells: 0 if all are equal, NaN where x is NaN."""
    finite = [x for x in values.flatten().tolist() if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scaled = [
        x if math.isnan(x) else (min(max(x, low), high) - low) / (high - low) if high > low else 0.0
        for x in values.flatten().tolist()
    ]
    return torch.tensor(scaled, dtype=torch.float64).view(values.shape)


def closeness(rows: int, columns: int) -> torch.Tensor:
    """Return each cell's closeness to the center: 1 in the middle, 0 in a corner cell, 1 for a map of one cell."""
    distance = torch.zeros(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            distance[r, c] = math.hypot((r + 0.5) / rows - 0.5, (c + 0.5) / columns - 0.5)
    corner = distance[0, 0]
    return 1 - distance / corner if corner > 0 else torch.ones_like(distance)


def with_parts(cam, features, saliency) -> torch.Tensor:
    """Return the saliency: a float64 activation map, combined with the norm and the closeness to the center."""
    if saliency.norm == 0 and saliency.center == 0:
        return cam
    length = features.double().cpu().square().sum(2).sqrt().view(cam.shape)
    combined = torch.stack([unit(image) for image in cam])
    if saliency.norm:
        combined += saliency.norm * torch.stack([unit(image) for image in length])
    return combined + saliency.center * closeness(*cam.shape[1:]) if saliency.center else combined


def resized(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize bilinearly with half-pixel centers and without antialiasing, as PyTorch does.

    Along an axis of equal size each cell is its own neighbour, with a weight of 0. So NaN does not spread, and an
    infinite cell becomes NaN.
    """
    for axis in (1, 0):
        given, wanted = image.shape[axis], size[axis]
        places = [max((i + 0.5) * given / wanted - 0.5, 0.0) for i in range(wanted)]
        low = [min(int(place), given - 1) for place in places]
        high = low if given == wanted else [min(i + 1, given - 1) for i in low]
        share = torch.tensor([place - i for place, i in zip(places, low, strict=True)], dtype=torch.float64)
        share = share.view((-1, 1) if axis == 0 else (1, -1))
        image = image.index_select(axis, torch.tensor(low)) * (1 - share) + (
            image.index_select(axis, torch.tensor(high)) * share
        )
    return image


def assert_selected(selection, logits, maps, grids, law, terms=1) -> None:
    """Assert that confidence and saliency are close to float64, and that the rest follows from them exactly.

    Args:
        maps: the expected saliency, float64 ``(batch, rows, columns)`` on the CPU.
        terms: number of terms in the sum that makes each cell.
    """
    indices, counts, levels, confidence, saliency = (t.cpu() for t in selection)
    patches = grids[0][0] * grids[0][1]
    assert indices.dtype == counts.dtype == levels.dtype == torch.int32
    assert confidence.dtype == saliency.dtype == torch.float32
    assert indices.shape == saliency.shape == (len(logits), patches)
    wanted = logits.double().cpu().softmax(1).amax(1)
    bound = tolerance(torch.float32, logits.shape[1]) + 4 * EPS  # 4 for the exponential
    torch.testing.assert_close(confidence.double(), wanted, rtol=bound, atol=0, equal_nan=True)
    assert not (confidence > 1).any()
    assert_obeys(counts, levels, confidence, grids, law)
    # The bound is relative to the batch's greatest cells, because terms may cancel and leave a cell much smaller than
    # its partial sums. A place is rounded by an ulp of a side, which shifts that much weight to any neighbour.
    scale = maps.nan_to_num(0, 0, 0).abs().max().item() if len(maps) else 0.0
    bound = scale * (tolerance(torch.float32, terms) + EPS * max(maps.shape[1:]))
    for image, level, row, scores, count in zip(
        maps, levels.tolist(), indices.tolist(), saliency, counts.tolist(), strict=True
    ):
        own = grids[level][0] * grids[level][1]
        assert (scores[own:] == 0).all()
        expected = resized(image, grids[level]).flatten()
        torch.testing.assert_close(scores[:own].double(), expected, rtol=0, atol=bound, equal_nan=True)
        assert row == sorted(rank_of(scores[:own].tolist())[:count]) + [-1] * (patches - count)
