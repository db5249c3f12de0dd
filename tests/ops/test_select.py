"""Tests of the selection on every backend, against float64. Kernel and reference are bit-equal if nothing is rounded.

Grids are 1 x 1 (one token), 5 x 7 (primes, not square), 14 x 14 (the usual), 37 x 37 (DINOv2 at 518 pixels) and 64 x 64
(the largest). Lists have one grid, or several so that a batch mixes levels. Maps are smaller than the grid, equal,
larger, and not square.
"""

import math

import pytest
import torch

from tinydrop_kernels import ops
from tinydrop_kernels.ops import Law, Saliency

from .cases import DTYPES, integers, logits_of
from .selection_oracle import activation_map, assert_selected, rank_of, with_parts

# Ignore NumPy's warnings of NaN and infinities. The tests use such values on purpose, and the interpreter uses NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAW = Law(0.8, 2.0, 0.1, 0.6)
DROPS = LAW._replace(coarsen=0.0)
GRIDS = [[(1, 1)], [(5, 7), (4, 6), (3, 5), (1, 1)], [(14, 14), (12, 12), (10, 10), (9, 9), (7, 7)], [(16, 12), (8, 6)]]
MAPS = [(1, 1), (3, 2), (5, 7), (14, 14), (16, 20)]
PLAIN = Saliency()
CONFIDENCES = [0.21, 0.4, 0.6, 0.7, 0.79, 0.81]  # all levels, and an exit


def check_tokens(logits, features, weight, size, grids, law, parts=PLAIN):
    selection = ops.select_tokens(logits, features, weight, size, grids, law, parts)
    cam = activation_map(logits.cpu(), features, weight, size, parts.classes)
    assert_selected(selection, logits, with_parts(cam, features, parts), grids, law, features.shape[2])
    return selection


def check_saliency(logits, saliency, grids, law):
    selection = ops.select_from_saliency(logits, saliency, grids, law)
    assert_selected(selection, logits, saliency.double().cpu(), grids, law)
    return selection


@pytest.mark.parametrize("grids", GRIDS, ids=lambda grids: str(grids[0]))
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_select_tokens(backend, grids, size):
    device = backend.device
    logits, features = logits_of(CONFIDENCES, device=device), torch.randn(6, size[0] * size[1], 37, device=device)
    selection = check_tokens(logits, features, torch.randn(5, 37, device=device), size, grids, LAW)
    assert len(grids) == 1 or len(set(selection.levels.tolist())) > 1


# The resize weights are quarters and halves for these sizes, so no product or sum is rounded.
@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((1, 1), [(1, 1)]),
        ((7, 7), [(14, 14), (7, 7)]),
        ((5, 7), [(10, 14), (5, 7)]),
        ((16, 20), [(16, 20), (8, 10), (4, 5), (2, 5)]),
        ((9, 9), [(36, 36), (18, 18), (9, 9)]),
    ],
    ids=str,
)
def test_bit_equal(triton, size, grids):
    device = triton.device
    arguments = (
        *(logits_of(CONFIDENCES, device=device), integers(6, size[0] * size[1], 37, device=device)),
        *(integers(5, 37, device=device), size, grids, LAW),
    )
    with ops.use_backend("reference"):
        wanted = ops.select_tokens(*arguments)
    selection = ops.select_tokens(*arguments)
    for name in ("indices", "counts", "levels", "saliency"):
        assert torch.equal(getattr(selection, name), getattr(wanted, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NLC", "gaps"])
def test_dtypes_and_strides(backend, dtype, layout):
    device = backend.device
    logits, weight = logits_of([0.3, 0.5, 0.9], device=device).to(dtype), integers(5, 448, device=device).to(dtype)
    features = integers(3, 49, 448, device=device).to(dtype)
    if layout == "NCHW":
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        gaps = features.new_full((3, 50, 2, 449), float("nan"))
        gaps[:, 1:, 1, :448] = features
        features = gaps[:, 1:, 1, :448]
        logits, weight = logits.t().contiguous().t(), weight.t().contiguous().t()
        assert not any(t.is_contiguous() for t in (features, logits, weight))
    for parts in (PLAIN, Saliency(3, 0.5, 0.25)):
        check_tokens(logits, features, weight, (7, 7), [(14, 14), (9, 9)], LAW, parts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (17, 17)], ids=str)
def test_a_thousand_classes(backend, dtype, size):
    """Check logits and features of realistic sizes, with low to high confidences."""
    logits = torch.randn(6, 1000, device=backend.device)
    logits[torch.arange(6), torch.arange(0, 900, 150)] += torch.linspace(6, 12, 6, device=backend.device)
    features = torch.randn(6, size[0] * size[1], 37, device=backend.device).to(dtype)
    weight = torch.randn(1000, 37, device=backend.device).to(dtype)
    check_tokens(logits.to(dtype), features, weight, size, GRIDS[2], LAW, Saliency(5, 1.0, 1.0))


@pytest.mark.parametrize("side", [37, 64])
def test_large_grids(backend, side):
    device, grids = backend.device, [(side, side), (side // 2, side // 2)]
    features, weight = integers(1, 25, 1280, device=device), integers(5, 1280, device=device)
    check_tokens(logits_of([0.5], device=device), features, weight, (5, 5), grids, LAW)
    check_saliency(logits_of([0.7], device=device), torch.rand(1, 64, 64, device=device), grids, LAW)


@pytest.mark.parametrize("classes", [1, 4])
def test_more_classes_than_a_tile(backend, classes):
    device = backend.device
    logits = torch.full((3, 5000), -2.0, device=device)
    logits[0, 4999] = 9.0
    logits[1, [2100, 2048, 17, 4000]] = 8.0  # the first of equal logits wins, across tiles too
    logits[2, 2048:] = float("-inf")
    features, weight = integers(3, 6, 4, device=device), integers(5000, 4, device=device)
    check_tokens(logits, features, weight, (2, 3), [(5, 7)], LAW, Saliency(classes))


@pytest.mark.parametrize(
    "parts",
    [Saliency(3), Saliency(9), Saliency(1, 1.0), Saliency(1, 0.0, 0.5), Saliency(5, 1.0, 1.0), Saliency(2, 0.3, 2.0)],
    ids=lambda parts: "-".join(map(str, parts)),
)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 7), (16, 20)], ids=str)  # 16 x 20: more cells than patches
def test_parts_of_the_saliency(backend, parts, size):
    """Check all parts of the saliency, with more classes than there are and with maps smaller than a row of threads."""
    device = backend.device
    logits, weight = torch.randn(3, 7, device=device), torch.randn(7, 37, device=device)
    features = torch.randn(3, size[0] * size[1], 37, device=device)
    features[1] = 0.0  # all cells are equally salient except for the center
    check_tokens(logits, features, weight, size, [(14, 14), (10, 10)], LAW, parts)


def test_classes_are_weighed_by_their_probabilities(backend):
    """Check the weight of each class. Among equal logits the lower class comes first, up to ``classes`` in total."""
    logits = torch.tensor([[1.0, 3.0, 3.0, -math.inf, 3.0]], device=backend.device)
    features, weight = torch.eye(5, device=backend.device)[None], torch.eye(5, device=backend.device)
    for classes, wanted in (
        (1, [0, 1, 0, 0, 0]),
        (2, [0, 1, 1, 0, 0]),
        (4, [math.exp(-2), 1, 1, 0, 1]),
        (5, [math.exp(-2), 1, 1, 0, 1]),
    ):
        law, parts = Law(None, 1.0, 0.1), Saliency(classes)
        selection = ops.select_tokens(logits, features, weight, (1, 5), [(1, 5)], law, parts)
        torch.testing.assert_close(selection.saliency.cpu(), torch.tensor([wanted], dtype=torch.float32))


def test_parts_of_strange_cells(backend):
    """Check that NaN stays in its cell and that infinities are clamped to the range of the finite cells."""
    features = torch.rand(4, 24, 3, device=backend.device)
    features[0, 5, 1] = math.nan
    features[1, 7, 0] = math.inf
    features[2] = math.nan
    features[3, 1:] = math.inf
    weight = torch.rand(5, 3, device=backend.device) + 0.1
    logits = logits_of([0.3, 0.5, 0.6, 0.7], device=backend.device)
    selection = check_tokens(logits, features, weight, (4, 6), [(4, 6)], DROPS, Saliency(1, 0.5, 0.25))
    assert selection.saliency.isnan().sum(1).tolist() == [1, 0, 24, 0]


@pytest.mark.parametrize("tau", [None, 0.6])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 40.0, math.inf])
@pytest.mark.parametrize("coarsen", [0.0, 0.5, 1.0])
def test_law(backend, tau, gamma, coarsen):
    logits = logits_of([0.201, 0.4, 0.59, 0.61, 0.999], device=backend.device)
    law = Law(tau, gamma, 0.3 if gamma == 0 else 0.01, coarsen)
    saliency = torch.rand(5, 3, 4, device=backend.device)
    check_saliency(logits, saliency, [(14, 14), (12, 12), (10, 10), (7, 7)], law)


def test_rounding_does_not_cost_a_patch(backend):
    """Check budgets that are a whole number of patches except for the rounding of softmax and power."""
    counts = [7, 21, 49, 60, 93, 98, 111, 126, 139]
    logits = logits_of([0.9 * (1 - count / 196) for count in counts], device=backend.device)
    saliency = torch.rand(len(counts), 3, 3, device=backend.device)
    selection = ops.select_from_saliency(logits, saliency, [(14, 14)], Law(0.9, 1.0, 0.01))
    assert selection.counts.tolist() == counts


@pytest.mark.parametrize("confidences", [[0.9, 0.95], [0.3, 0.5]], ids=["all exit", "none exits"])
def test_exits(backend, confidences):
    features, weight = integers(2, 9, 8, device=backend.device), integers(5, 8, device=backend.device)
    logits = logits_of(confidences, device=backend.device)
    selection = check_tokens(logits, features, weight, (3, 3), [(5, 7), (3, 4)], LAW)
    assert (selection.counts == 0).all() == (confidences[0] > 0.8)


def test_sure_beyond_float32(backend):
    logits = torch.tensor([[200.0, 0.0, -200.0]], device=backend.device)
    for tau in (None, 1.0, 0.99):
        saliency = torch.rand(1, 4, 4, device=backend.device)
        selection = check_saliency(logits, saliency, [(5, 7), (3, 4)], Law(tau, 2.0, 0.25, 0.5))
        assert (selection.counts[0] == 0) == (tau == 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (14, 14), (5, 14)], ids=str)
def test_ties_and_infinities(backend, grid, size):
    saliency = torch.randint(0, 3, (4, *size), device=backend.device).float()
    saliency[0] = 0.0
    saliency[1] *= torch.rand(size, device=backend.device) < 0.1
    saliency[2, 0, 0], saliency[2, -1, -1] = -math.inf, -1.0
    saliency[3, 0, 0] = -0.0
    for law in (Law(None, 1.0, 0.1), Law(None, 0.0, 0.4), Law(0.55, 1.0, 0.1), Law(0.2, 1.0, 0.1)):
        check_saliency(logits_of([0.3, 0.5, 0.6, 0.7], device=backend.device), saliency, [grid], law)


def test_ties_go_to_the_lower_index(backend):
    """Check that among equal scores the lower index wins, and that minus zero equals zero."""
    saliency = torch.zeros(1, 4, 4, device=backend.device)
    saliency[0, 0, :2] = -0.0
    saliency[0, 2, 1] = 1.0
    selection = ops.select_from_saliency(
        logits_of([0.5], device=backend.device), saliency, [(4, 4)], Law(None, 0, 0.25)
    )
    assert selection.indices[0, :4].tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("grid", [(4, 6), (8, 12), (4, 12)], ids=str)
def test_nan_cells_rank_last(backend, grid):
    features, weight = integers(3, 24, 8, device=backend.device), integers(5, 8, device=backend.device)
    features[0, 9, 3] = float("nan")
    features[1] = float("nan")
    logits = logits_of([0.5, 0.5, 0.5], device=backend.device)
    selection = check_tokens(logits, features, weight, (4, 6), [grid], DROPS)
    kept = selection.saliency[0].cpu()[selection.indices[0, : selection.counts[0]].long().cpu()]
    assert not kept.isnan().any() and selection.saliency[0].isnan().any()
    count = int(selection.counts[1])
    assert selection.indices[1, :count].tolist() == list(range(count))


LIMITS = [Law(None, 2.0, 0.1), LAW, Law(0.8, 0.0, 0.1, 1.0), Law(0.8, math.inf, 0.1, 0.5)]


@pytest.mark.parametrize("law", LIMITS, ids=str)
def test_an_image_without_a_confidence_keeps_everything(backend, law):
    """Check logits with a NaN, with an infinity, and with only NaN. Other images are decided as if they were alone."""
    logits = logits_of([0.5] * 4, device=backend.device)
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    logits[2, 2] = float("inf")
    features, weight = integers(4, 9, 8, device=backend.device), integers(5, 8, device=backend.device)
    features[0] = float("nan")
    selection = check_tokens(logits, features, weight, (3, 3), [(5, 7), (3, 4)], law)
    assert selection.counts.tolist()[:3] == [35, 35, 35] and selection.levels.tolist()[:3] == [0, 0, 0]
    alone = ops.select_tokens(logits[3:], features[3:], weight, (3, 3), [(5, 7), (3, 4)], law)
    assert all(torch.equal(one[3:], other) for one, other in zip(selection, alone, strict=True))


def test_saliency_of_any_strides_and_dtype(backend):
    for dtype in DTYPES:
        saliency = torch.rand(2, 9, 5, 2, device=backend.device).to(dtype)[..., 1].transpose(1, 2)
        check_saliency(logits_of([0.5, 0.7], device=backend.device), saliency, [(14, 14), (9, 9)], LAW)


def test_empty_batch(backend):
    logits = torch.empty(0, 5, device=backend.device)
    shapes = [(0, 35), (0,), (0,), (0,), (0, 35)]
    features, weight = logits.new_empty(0, 4, 3), logits.new_empty(5, 3)
    selection = ops.select_tokens(logits, features, weight, (2, 2), [(5, 7), (3, 4)], LAW, Saliency(2, 1.0, 1.0))
    assert [tuple(t.shape) for t in selection] == shapes
    selection = ops.select_from_saliency(logits, logits.new_empty(0, 2, 2), [(5, 7)], LAW)
    assert [tuple(t.shape) for t in selection] == shapes


def test_the_oracle_ranks_as_a_stable_sort():
    scores = torch.tensor([0.5, math.nan, 2.0, -math.inf, 0.5, math.inf, -0.0, 0.0])
    order = scores.nan_to_num(-math.inf, math.inf, -math.inf).sort(descending=True, stable=True).indices.tolist()
    assert [i for i in order if i not in (1, 3)] == rank_of(scores.tolist())[:6]
