"""The kernels of selection and packing against the reference, in Triton's interpreter where there is no GPU.

Features and weights are small integers: their dot products are exact in float32 in any order of summation, so that the
kernel and the reference rank the same numbers, and indices can be compared for equality.

Grids: 1 x 1 (one token), 5 x 7 (primes, not square, one masked tile), 14 x 14 (two tiles, the usual), 16 x 16 (tiles
without a mask), 24 x 24 (384 pixels); 37 x 37 (DINOv2 at 518 pixels) and 64 x 64, the largest, once each. Maps are
smaller, equal, larger and not square. Channels that fill no tile and more than one.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from tinydrop_kernels import ops
from tinydrop_kernels.ops import reference
from tinydrop_kernels.ops.kernels import pack, select_from_saliency, select_tokens

# NaN and infinities are met on purpose, and NumPy, with which the interpreter computes, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [(1, 1), (5, 7), (14, 14), (16, 16), (24, 24)]
MAPS = [(1, 1), (3, 2), (5, 7), (14, 14), (16, 20)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAW = (0.8, 2.0, 0.1)


def logits_of(confidences: list[float], classes: int = 5) -> torch.Tensor:
    """Logits whose max softmax is as asked for, each image's at another class."""
    rows = [[math.log((1 - c) / (classes - 1))] * classes for c in confidences]
    for b, (row, confidence) in enumerate(zip(rows, confidences, strict=True)):
        row[b % classes] = math.log(confidence)
    return torch.tensor(rows, device=DEVICE)


def integers(*shape: int) -> torch.Tensor:
    """Small enough for their products to be exact in float16 and bfloat16 inputs and float32 sums."""
    return torch.randint(-3, 4, shape, device=DEVICE).float()


def assert_selected(selection, wanted):
    indices, counts, confidence, saliency = selection
    torch.testing.assert_close(confidence, wanted[2], equal_nan=True)
    # The places are rounded by an ulp, which weighs a neighbour of any size: compared with the greatest of the map.
    scale = wanted[3].nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(saliency, wanted[3], atol=1e-6 * scale, rtol=1e-5, equal_nan=True)
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.tolist() == wanted[1].tolist()
    # The kernel's own map decides, where it differs from the reference's by a rounding.
    order = saliency.flatten(1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    order = order.sort(dim=1, descending=True, stable=True).indices
    for row, first, count in zip(indices.tolist(), order, counts.tolist(), strict=True):
        assert row == sorted(first[:count].tolist()) + [-1] * (len(row) - count)
    if torch.equal(saliency, wanted[3]):
        assert torch.equal(indices, wanted[0])


def check_tokens(*args):
    assert_selected(select_tokens.launch(*args), reference.select_tokens(*args))


def check_saliency(*args):
    assert_selected(select_from_saliency.launch(*args), reference.select_from_saliency(*args))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", MAPS, ids=str)
def test_select_tokens(grid, size):
    logits = logits_of([0.21, 0.4, 0.79, 0.81])
    check_tokens(logits, integers(4, size[0] * size[1], 37), integers(5, 37), size, grid, *LAW)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NLC", "gaps"])
def test_dtypes_and_strides(dtype, layout):
    logits, weight = logits_of([0.3, 0.5, 0.9]).to(dtype), integers(5, 448).to(dtype)
    features = integers(3, 49, 448).to(dtype)
    if layout == "NCHW":
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "gaps":
        gaps = features.new_full((3, 50, 2, 449), float("nan"))
        gaps[:, 1:, 1, :448] = features
        features = gaps[:, 1:, 1, :448]
        logits, weight = logits.t().contiguous().t(), weight.t().contiguous().t()
        assert not any(t.is_contiguous() for t in (features, logits, weight))
    check_tokens(logits, features, weight, (7, 7), (14, 14), *LAW)


@pytest.mark.parametrize("grid", [(37, 37), (64, 64)], ids=str)
def test_large_grids(grid):
    check_tokens(logits_of([0.5]), integers(1, 25, 1280), integers(5, 1280), (5, 5), grid, *LAW)
    check_saliency(logits_of([0.81]), torch.rand(1, 64, 64, device=DEVICE), grid, *LAW)


def test_more_classes_than_a_tile():
    logits = torch.full((3, 5000), -2.0, device=DEVICE)
    logits[0, 4999] = 9.0
    logits[1, [2100, 2048, 17, 4000]] = 8.0  # the first of equals wins, across tiles too
    logits[2, 2048:] = float("-inf")
    check_tokens(logits, integers(3, 6, 4), integers(5000, 4), (2, 3), (5, 7), *LAW)


@pytest.mark.parametrize("tau", [None, 1.0, 0.6])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 40.0, math.inf])
@pytest.mark.parametrize("min_keep", [0.01, 0.25, 1.0])
def test_law(tau, gamma, min_keep):
    logits = logits_of([0.201, 0.25, 0.4, 0.59, 0.61, 0.8, 0.999])
    check_saliency(logits, torch.rand(7, 7, 7, device=DEVICE), (14, 14), tau, gamma, min_keep)


@pytest.mark.parametrize("confidences", [[0.9, 0.95], [0.3, 0.5]], ids=["all exit", "none exits"])
def test_exits(confidences):
    check_tokens(logits_of(confidences), integers(2, 9, 8), integers(5, 8), (3, 3), (5, 7), *LAW)


def test_sure_beyond_float32():
    logits = torch.tensor([[200.0, 0.0, -200.0]], device=DEVICE)
    for tau in (None, 1.0, 0.99):
        check_saliency(logits, torch.rand(1, 4, 4, device=DEVICE), (5, 7), tau, 2.0, 0.25)


@pytest.mark.parametrize("grid", [(5, 7), (14, 14)], ids=str)
@pytest.mark.parametrize("size", [(5, 7), (14, 14), (5, 14)], ids=str)
def test_ties_and_infinities(grid, size):
    saliency = torch.randint(0, 3, (4, *size), device=DEVICE).float()
    saliency[0] = 0.0
    saliency[1] *= torch.rand(size, device=DEVICE) < 0.1
    saliency[2, 0, 0], saliency[2, -1, -1] = -math.inf, -1.0
    saliency[3, 0, 0] = -0.0
    check_saliency(logits_of([0.3, 0.5, 0.6, 0.7]), saliency, grid, None, 1.0, 0.1)


@pytest.mark.parametrize("grid", [(4, 6), (8, 12), (4, 12)], ids=str)
def test_nan_cells(grid):
    features, weight = integers(3, 24, 8), integers(5, 8)
    features[0, 9, 3] = float("nan")
    features[1] = float("nan")
    check_tokens(logits_of([0.5, 0.5, 0.5]), features, weight, (4, 6), grid, *LAW)


@pytest.mark.parametrize("tau", [None, 0.8])
def test_nan_logits_keep_everything(tau):
    logits = logits_of([0.5, 0.5, 0.5])
    logits[0] = float("nan")
    logits[1, 3] = float("nan")
    args = (logits, integers(3, 9, 8), integers(5, 8), (3, 3), (5, 7), tau, 2.0, 0.1)
    check_tokens(*args)
    assert select_tokens.launch(*args)[1].tolist()[:2] == [35, 35]


@pytest.mark.parametrize("gamma", [0.0, math.inf])
def test_limits_of_gamma_hold_for_any_confidence(gamma):
    """NaN keeps everything even where gamma = 0, and gamma = inf everything even of a sure image."""
    logits = torch.tensor([[float("nan"), 0.0], [300.0, 0.0]], device=DEVICE)
    counts = select_from_saliency.launch(logits, torch.rand(2, 4, 4, device=DEVICE), (4, 4), None, gamma, 0.25)[1]
    assert counts.tolist() == [16, 4 if gamma == 0 else 16]


def test_saliency_of_any_strides_and_dtype():
    for dtype in DTYPES:
        saliency = torch.rand(2, 9, 5, 2, device=DEVICE).to(dtype)[..., 1].transpose(1, 2)
        check_saliency(logits_of([0.5, 0.7]), saliency, (14, 14), *LAW)


def min_max(cells: list[float], resized: torch.Tensor) -> torch.Tensor:
    """(s - min) / (max - min), written from the contract."""
    finite = [c for c in cells if math.isfinite(c)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    values = [
        s if math.isnan(s) else (min(max(s, low), high) - low) / (high - low) if high > low else 0.0
        for s in resized.flatten().tolist()
    ]
    return torch.tensor(values, device=DEVICE).view(resized.shape)


def assert_normalised(plain, normalised, maps):
    """The same decisions, bit by bit; the saliency in [0, 1], or NaN where it was."""
    for one, other in zip(plain[:3], normalised[:3], strict=True):
        assert torch.equal(one, other)
    wanted = torch.stack([min_max(m.flatten().tolist(), s) for m, s in zip(maps.float(), plain[3], strict=True)])
    torch.testing.assert_close(normalised[3], wanted, atol=1e-6, rtol=1e-6, equal_nan=True)
    assert ((normalised[3] >= 0) & (normalised[3] <= 1) | plain[3].isnan()).all()


def strange_maps(*size: int) -> torch.Tensor:
    """Ordinary, negative, constant (at a number that interpolation does not hit exactly), with NaN and infinities."""
    maps = torch.rand(8, *size, device=DEVICE)
    maps[1] -= 3.0
    maps[2] = 0.1
    maps[3, 0, 0] = math.nan
    maps[4, 0, 0], maps[4, -1, -1] = math.inf, -math.inf
    maps[5] = math.nan
    maps[6] = math.inf
    maps[7] = 0.0
    maps[7, 0, 0] = math.inf
    return maps


# 3 x 5: fewer cells than a tile of patches; 40 x 37: more, and the last tile of them is not full.
@pytest.mark.parametrize("size", [(3, 5), (14, 14), (40, 37)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", [select_from_saliency.launch, reference.select_from_saliency])
def test_normalised_saliency(select, size, dtype):
    maps = strange_maps(*size).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (logits_of([0.5] * 8), maps, (14, 14), *LAW)
    assert_normalised(select(*arguments), select(*arguments, True), maps)


@pytest.mark.parametrize("select", [select_tokens.launch, reference.select_tokens])
def test_normalised_class_activation_map(select):
    features, weight = integers(3, 12, 37), integers(5, 37)
    features[1], features[2, 4, 7] = 0.0, math.nan
    arguments = (logits_of([0.3, 0.5, 0.6]), features, weight, (3, 4), (14, 14), *LAW)
    maps = torch.einsum("blc,bc->bl", features, weight[:3]).relu().view(3, 3, 4)
    assert_normalised(select(*arguments), select(*arguments, True), maps)


def test_normalised_through_the_operators():
    logits, features, weight = logits_of([0.3, 0.5, 0.9]), integers(3, 9, 8), integers(5, 8)
    maps = torch.rand(3, 3, 3, device=DEVICE)
    for operator, arguments in (
        ("select_tokens", (logits, features, weight, (3, 3), (5, 7), *LAW)),
        ("select_from_saliency", (logits, maps, (5, 7), *LAW)),
    ):
        registered = getattr(torch.ops.tinydrop, operator).default
        torch.library.opcheck(registered, (*arguments, True))
        for backend in ("reference", "triton"):
            with ops.use_backend(backend):
                normalised = getattr(ops, operator)(*arguments, normalise=True).saliency
                assert normalised.amax() == 1 and normalised.amin() >= 0
                assert not torch.equal(normalised, getattr(ops, operator)(*arguments).saliency)


def test_empty_batch():
    shapes = [(0, 35), (0,), (0,), (0, 5, 7)]
    logits = torch.empty(0, 5, device=DEVICE)
    selection = select_tokens.launch(logits, logits.new_empty(0, 4, 3), logits.new_empty(5, 3), (2, 2), (5, 7), *LAW)
    assert [tuple(t.shape) for t in selection] == shapes
    selection = select_from_saliency.launch(logits, logits.new_empty(0, 2, 2), (5, 7), *LAW)
    assert [tuple(t.shape) for t in selection] == shapes


# One tile holds 512 images: none that stays, a single one, a full tile, one more, several.
@pytest.mark.parametrize("batch", [1, 4, 512, 513, 1300])
@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("summary", [False, True])
def test_pack(batch, prefix, summary):
    counts = torch.randint(-8, 17, (batch,), device=DEVICE).clamp(min=0).int()
    for given in (counts, torch.zeros_like(counts), counts.repeat_interleave(2)[::2]):
        cu_seqlens, sizes = pack.launch(given, 16, prefix, summary)
        wanted_cu_seqlens, wanted_sizes = reference.pack(given, 16, prefix, summary)
        assert cu_seqlens.dtype == sizes.dtype == torch.int32
        assert torch.equal(cu_seqlens, wanted_cu_seqlens) and torch.equal(sizes, wanted_sizes)
