"""Tests of attention in every implementation that the machine has, against float64.

Segment lengths:

* lengths just below, at and above every tile (16, 32, 64, 128, a loop beyond).
* 0, 1 and 2 tokens.
* lengths that ViTs have: 50 (a quarter of 14 x 14 and a class token), 99, 197, 257, 577 (384 pixels) and 1370 (518
  pixels).

Head dimensions: 64 is usual, 8 is less than a tile, 16 and 128 fill a tile, and 72 and 88 fit no tile.
"""

import pytest
import torch
from slow import mostly_slow

from tinydrop_kernels import ops
from tinydrop_kernels.ops.attention_reference import attend_padded

from .attention_oracle import exact
from .cases import DTYPES, GPU, SANITIZED, cu_seqlens_of

# Errors relative to the norm of the float64 result. For float32, 16 units in the last place: two each for a GPU's
# approximate exponential and reciprocal, three for rounding exponents of up to 16, and a margin. In half precision,
# rounding the weights and the result determines the error.
TOLERANCE = {torch.float32: 16 * torch.finfo(torch.float32).eps, torch.float16: 2e-3, torch.bfloat16: 1e-2}
MARGIN = 0 if SANITIZED else 128  # rows of NaN around the rows that may be read
LENGTHS = (
    [0, 1, 2, 15, 16, 0],
    [17, 31, 1, 32],
    [33, 49, 0, 50, 63, 64],
    [65, 99, 127, 3, 128],
    [129, 197, 20, 257],
    [5, 5, 9, 5, 0, 9],
    [70, 3, 70, 70],
    [80, 80, 0],
    [0],
    [],
)
GRID = (5, 7)


def projections(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple:
    """Return query, key and value as views of one projection, as in timm's attention, surrounded by NaN."""
    total = sum(lengths)
    rows = torch.full((total + 2 * MARGIN, 3, heads, head_dim), float("nan"), dtype=dtype, device=device)
    rows = rows[MARGIN : MARGIN + total]
    rows.copy_(torch.randn(total, 3, heads, head_dim))
    return rows.unbind(1)


def bias_for(total: int, heads: int, dtype: torch.dtype, device: str, class_token: bool = True) -> ops.RelativeBias:
    """Return a bias with a head-major table and random places on GRID, some of them class tokens."""
    rows, columns = GRID
    distances = (2 * rows - 1) * (2 * columns - 1)
    table = torch.randn(heads, distances + 3 * class_token, device=device).to(dtype).t()
    positions = torch.randint(-1 if class_token else 0, rows * columns, (total,), dtype=torch.int32, device=device)
    return ops.RelativeBias(table, positions, GRID)


def expected_to_take(backend, query, scale, bias, skip_keys) -> bool:
    """Return whether the docs say that the backend takes such arguments. An implementation that takes less fails."""
    head_dim, dtype = query.shape[2], query.dtype
    is_normal = scale is None or 2.0**-126 <= scale <= 2.0**126
    if backend.name == "reference":
        return True
    if backend.name == "triton":
        return is_normal and head_dim <= 128 and dtype in DTYPES
    if dtype == torch.float32 or dtype not in DTYPES or head_dim % 8 or not len(query):
        return False
    if backend.name == "torch":
        return bias is None and not skip_keys and (scale is None or scale > 0)
    return is_normal and head_dim <= 128


def attend(backend, query, key, value, lengths_q, lengths_k, scale=None, bias=None, skip_keys=0, longest=None):
    """Attend with the backend's implementation, or skip the test if that does not take the arguments."""
    cu_seqlens = [cu_seqlens_of(lengths, backend.device) for lengths in (lengths_q, lengths_k)]
    bounds = [longest or max(lengths, default=0) for lengths in (lengths_q, lengths_k)]
    if backend.name == "padded":
        starts, ends = cu_seqlens[1][:-1] + skip_keys, cu_seqlens[1][1:]
        return attend_padded(query, key, value, cu_seqlens[0], starts, ends, *bounds, scale, bias)
    table = (None, None, (1, 1)) if bias is None else bias
    if not expected_to_take(backend, query, scale, bias, skip_keys):
        pytest.skip(f"{backend.name} does not take this")
    operator = ops.OPERATORS["varlen_attention"]
    assert operator.choose(query, key, value, *cu_seqlens, *bounds, scale, *table, skip_keys).name == backend.name
    return ops.varlen_attention(query, key, value, *cu_seqlens, *bounds, scale, bias, skip_keys)


def assert_near(out: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Assert that the error of the output is small in norm, and of no row of a head much larger."""
    assert out.shape == wanted.shape and out.is_contiguous()
    error = (out.double().cpu() - wanted).norm(dim=-1)
    assert error.norm() <= tolerance * wanted.norm()  # false for NaN
    assert (error <= 4 * tolerance * wanted.norm(dim=-1).clamp(min=1e-3)).all()


def check(backend, query, key, value, lengths_q, lengths_k, *options, tolerance=None, **others):
    out = attend(backend, query, key, value, lengths_q, lengths_k, *options, **others)
    others.pop("longest", None)
    wanted = exact(query, key, value, lengths_q, lengths_k, *options, **others)
    assert out.dtype == query.dtype
    assert_near(out, wanted, tolerance or TOLERANCE[query.dtype])
    return out


@pytest.mark.parametrize("lengths", mostly_slow(LENGTHS, *LENGTHS[:3], *LENGTHS[5:]), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_ragged_batches(attention_backend, lengths, dtype, biased):
    qkv = projections(lengths, 2, 64, dtype, attention_backend.device)
    bias = bias_for(sum(lengths), 2, dtype, attention_backend.device) if biased else None
    check(attention_backend, *qkv, lengths, lengths, None, bias)


@pytest.mark.parametrize("apart", [False, True], ids=["run", "apart"])
@pytest.mark.parametrize("same", [False, True], ids=["ragged", "whole"])
def test_windows(attention_backend, apart, same):
    """Check segments of equal length, as whole windows at the same places and as windows of different places."""
    lengths = [35, 1, 35, 2, 35] if apart else [35, 35, 35]
    qkv = projections(lengths, 2, 16, torch.float32, attention_backend.device)
    bias = bias_for(sum(lengths), 2, torch.float32, attention_backend.device, class_token=False)
    if same:
        places = [torch.arange(n, dtype=torch.int32) for n in lengths]
        bias = bias._replace(positions=torch.cat(places).to(attention_backend.device))
    check(attention_backend, *qkv, lengths, lengths, None, bias)


@pytest.mark.parametrize("head_dim", mostly_slow([8, 16, 72, 88, 128], 16, 72))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_head_dims(attention_backend, head_dim, dtype, biased):
    for lengths in ([7, 0, 16], [31, 5], [99, 130]):
        qkv = projections(lengths, 1, head_dim, dtype, attention_backend.device)
        bias = bias_for(sum(lengths), 1, dtype, attention_backend.device, class_token=False) if biased else None
        check(attention_backend, *qkv, lengths, lengths, 0.3, bias)


@pytest.mark.parametrize("head_dim", [16, 64, 72, 88, 128] if GPU else [])  # too slow in the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile(attention_backend, head_dim, dtype):
    """Check batches that mix long, short and empty segments, one for each tile."""
    lengths = [0, 1, 2, 15, 16, 17, 31, 32, 33, 49, 50, 63, 64, 65, 99, 127, 128, 129, 197, 198, 257, 577, 1370]
    for longest in (16, 32, 64, 128, 198, 1370):
        own = [n for n in lengths if n <= longest]
        own = own[1::2] + own[::2]
        qkv = projections(own, 3, head_dim, dtype, attention_backend.device)
        check(attention_backend, *qkv, own, own)
        check(attention_backend, *qkv, own, own[1:] + own[:1])  # one segment without keys


@pytest.mark.slow
@pytest.mark.parametrize("length", [577, 1370])
def test_long_segments(attention_backend, length):
    qkv = projections([length, 3], 1, 64, torch.float16, attention_backend.device)
    check(attention_backend, *qkv, [length, 3], [length, 3])


@pytest.mark.parametrize("keys", [[5, 0, 12], [40, 0, 64], [197, 0, 70]], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_queries_than_keys(attention_backend, keys, head_dim, dtype):
    """Check a few latent queries per image, as in attention pools. Queries of an image without tokens yield zeros."""
    device = attention_backend.device
    for queries in ([1, 1, 1], [2, 3, 0], [20, 4, 17]):
        query = torch.randn(2, sum(queries), head_dim, device=device).to(dtype).transpose(0, 1)
        _, key, value = projections(keys, 2, head_dim, dtype, device)
        out = check(attention_backend, query, key, value, queries, keys)
        assert (out[queries[0] : queries[0] + queries[1]] == 0).all()


@pytest.mark.parametrize("skip_keys", [1, 5])
@pytest.mark.parametrize("queries", ["the same", "one each"])
@pytest.mark.parametrize("lengths", [[0, 1, 5, 6, 16], [40, 3, 17], [130, 2, 70]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_skipped_keys(attention_backend, skip_keys, queries, lengths, dtype):
    """Check that skipped keys have no effect, even if they are NaN. Zeros result if no other keys are left."""
    device = attention_backend.device
    query, key, value = projections(lengths, 2, 16, dtype, device)
    rows = lengths if queries == "the same" else [1] * len(lengths)
    if queries == "one each":
        query = torch.randn(len(rows), 2, 16, device=device).to(dtype)
    out = check(attention_backend, query, key, value, rows, lengths, skip_keys=skip_keys)
    left = [max(0, n - skip_keys) for n in lengths]
    kept = torch.cat([torch.arange(n) >= skip_keys for n in lengths]).to(device)
    sliced = exact(query, key[kept], value[kept], rows, left)
    assert_near(out, sliced, TOLERANCE[dtype])
    hidden = ~kept[:, None, None]
    poisoned = (t.masked_fill(hidden, float("nan")) for t in (key, value))
    assert torch.equal(attend(attention_backend, query, *poisoned, rows, lengths, skip_keys=skip_keys), out)


def test_rows_far_apart(attention_backend):
    """Check rows that are too far apart for 32-bit offsets within a tile and must be copied first."""
    if attention_backend.name == "cuda":
        pytest.skip("cuda does not take this")
    lengths, device = [2, 1], attention_backend.device
    qkv = [torch.randn(1, 2, 16, device=device).expand(3, -1, -1) for _ in range(3)]
    far = [t.as_strided((3, 2, 16), (0, 16, 1)) for t in qkv]
    check(attention_backend, *far, lengths, lengths)
    row = torch.empty(2**24 + 64, dtype=torch.float16, device=device)
    pair = row.as_strided((2, 1, 32), (2**24 + 8, 32, 1)).copy_(torch.randn(2, 1, 32, device=device))
    check(attention_backend, pair, pair, pair, [2], [2])


def test_a_ragged_batch_takes_the_tile_of_its_mean():
    pytest.importorskip("triton")
    from tinydrop_kernels.ops.kernels.attention_tiles import tile_for

    def tile(longest, mean, head_dim=64, has_bias=False):
        return tile_for(longest, longest, mean, head_dim, False, has_bias)[:3]

    assert tile(107, 50) == tile(64, 50) == (64, 64, 4)
    assert tile(41, 20) == (32, 32, 2)
    assert tile(99, 99) == tile(107, 60) == (128, 128, 8)  # most segments fill it
    assert tile(197, 99) == tile(197, 197) == (128, 64, 8)
    assert tile(577, 10) == (128, 64, 8)  # one long segment would take many turns
    assert tile(107, 50, 128, True) == tile(107, 107, 128, True)


def test_bounds_may_exceed_the_longest_segment(attention_backend):
    for dtype in (torch.float32, torch.float16):
        qkv = projections([9, 4], 2, 16, dtype, attention_backend.device)
        for bound in (9, 33, 300):
            check(attention_backend, *qkv, [9, 4], [9, 4], longest=bound)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-40, 3.0])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_any_scale(attention_backend, scale, biased):
    """Check any scale. Implementations that find the highest score before scaling leave some scales to others."""
    device, lengths = attention_backend.device, [33, 0, 70]
    query, key, value = projections(lengths, 2, 16, torch.float32, device)
    bias = bias_for(sum(lengths), 2, torch.float32, device) if biased else None
    cu_seqlens = cu_seqlens_of(lengths, device)
    out = ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, 70, 70, scale, bias)
    assert_near(out, exact(query, key, value, lengths, lengths, scale, bias), TOLERANCE[torch.float32])


@pytest.mark.parametrize("lengths", [[16], [50], [130]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores_pick_one_key(attention_backend, lengths, dtype):
    """Check scores of +-10000: the output is the value of the single best key, and nothing overflows.

    In half precision the output is exactly that value. In float32 the key's weight may be a rounding error from 1.
    """
    total, device = sum(lengths), attention_backend.device
    _, _, value = projections(lengths, 1, 16, dtype, device)
    signs = torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(16)] for i in range(total)], device=device)
    query = (25 * signs).to(dtype)[:, None]  # 16 * 25 * 25 = 10000 with itself
    out = attend(attention_backend, query, query.clone(), value, lengths, lengths, 1.0)
    torch.testing.assert_close(out, value, atol=0, rtol=3e-7 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_thousands(attention_backend, dtype):
    """Check large scores. A score's absolute rounding error in float32 is the relative error of its weight."""
    lengths = [33, 0, 65, 7]
    query, key, value = projections(lengths, 2, 64, dtype, attention_backend.device)
    greatest = 30 * 30 * (query.float().norm(dim=-1).max() * key.float().norm(dim=-1).max()).item()
    tolerance = max(TOLERANCE[dtype], greatest * torch.finfo(torch.float32).eps)
    check(attention_backend, 30 * query, 30 * key, value, lengths, lengths, 1.0, tolerance=tolerance)


@pytest.mark.parametrize("length", mostly_slow([16, 50, 197], 16, 50))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_may_hide_keys(attention_backend, length, dtype):
    """Check a bias of -inf on whole tiles of keys, including the first. Zeros result if it hides all keys."""
    device = attention_backend.device
    qkv = projections([length], 1, 16, dtype, device)
    table = torch.zeros(2 * length - 1, 1, device=device, dtype=dtype)
    table[length:] = -float("inf")  # hides the keys before each query
    bias = ops.RelativeBias(table, torch.arange(length, dtype=torch.int32, device=device), (1, length))
    check(attention_backend, *qkv, [length], [length], None, bias)
    nothing = bias._replace(table=torch.full_like(table, -float("inf")))
    assert (attend(attention_backend, *qkv, [length], [length], None, nothing) == 0).all()


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(attention_backend, first, second, dtype):
    """Check contiguous tensors, heads outermost, non-contiguous columns, and both."""
    qkv = (
        t.transpose(first, second).contiguous() for t in projections([9, 12], 2, 16, dtype, attention_backend.device)
    )
    check(attention_backend, *(t.transpose(first, second) for t in qkv), [9, 12], [9, 12])


@pytest.mark.parametrize("lengths", [[16, 3], [50], [130]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_scores_average(attention_backend, lengths, dtype):
    query, key, value = projections(lengths, 2, 16, dtype, attention_backend.device)
    out = attend(attention_backend, torch.zeros_like(query), key, value, lengths, lengths)
    means = [segment.double().cpu().mean(0, keepdim=True).expand_as(segment) for segment in value.split(lengths)]
    assert_near(out, torch.cat(means), TOLERANCE[dtype])


@pytest.mark.parametrize("where", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_stays_in_its_segment(attention_backend, where, dtype):
    qkv, lengths = projections([4, 5, 20], 2, 16, dtype, attention_backend.device), [4, 5, 20]
    qkv[where][4:9] = float("nan")
    out = attend(attention_backend, *qkv, lengths, lengths)
    assert out[:4].isfinite().all() and out[9:].isfinite().all()
    if attention_backend.name == "triton":  # torch's own attention returns zeros for some NaN
        assert out[4:9].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_behind_the_last_segment(attention_backend, dtype):
    """Check that rows behind the last segment, which a padded CUDA graph has, do not affect the other rows."""
    qkv = projections([9, 4], 2, 16, dtype, attention_backend.device)
    for t in qkv:
        t[9:] = float("nan")
    out = attend(attention_backend, *qkv, [9], [9])
    assert out.shape[0] == 13
    assert_near(out[:9], exact(*(t[:9] for t in qkv), [9], [9]), TOLERANCE[dtype])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_float64(attention_backend, biased):
    """Check float64, which only the reference takes."""
    if attention_backend.name not in ("reference", "padded"):
        pytest.skip(f"{attention_backend.name} does not take this")
    keys = [2, 4, 7, 0, 0]
    queries = keys if biased else [2, 0, 7, 3, 0]
    _, key, value = projections(keys, 2, 16, torch.float64, attention_backend.device)
    query, _, _ = projections(queries, 2, 16, torch.float64, attention_backend.device)
    bias = bias_for(sum(queries), 2, torch.float64, attention_backend.device) if biased else None
    check(attention_backend, query, key, value, queries, keys, 0.2, bias, tolerance=1e-14)
    empty = [0] * 5
    assert (attend(attention_backend, query, key[:0], value[:0], queries, empty) == 0).all()


def test_gradients(attention_backend):
    """Check the gradients of query, key, value and bias against the formula, under every forced backend."""
    device, lengths = attention_backend.device, [3, 5]
    query, key, value = (t.clone().requires_grad_() for t in projections(lengths, 2, 16, torch.float64, device))
    bias = bias_for(8, 2, torch.float64, device)
    bias = bias._replace(table=bias.table.clone().requires_grad_())
    cu_seqlens, wanted_from = cu_seqlens_of(lengths, device), (query, key, value, bias.table)
    upstream = torch.randn_like(query)
    wanted = torch.autograd.grad(exact(query, key, value, lengths, lengths, None, bias), wanted_from, upstream.cpu())
    if attention_backend.name == "padded":
        out = attend(attention_backend, query, key, value, lengths, lengths, None, bias)
    else:
        out = ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, 5, 5, None, bias)
        with torch.no_grad():
            frozen = ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, 5, 5, None, bias)
            assert not frozen.requires_grad
    torch.testing.assert_close(torch.autograd.grad(out, wanted_from, upstream), wanted)


def test_a_segment_longer_than_said_is_refused_on_cpu():
    query, key, value = torch.randn(3, 13, 2, 16)
    cu_seqlens = cu_seqlens_of([9, 4])
    for bounds in ((8, 9), (9, 8)):
        message = (
            f"max_seqlen_q, max_seqlen_k: got {bounds[0]} and {bounds[1]}, "
            "expected at least 9 and 9, a segment's lengths"
        )
        with ops.use_backend("reference"), pytest.raises(ValueError, match=f"^{message}$"):
            ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, *bounds)


def test_index_is_timms():
    beit = pytest.importorskip("timm.models.beit")
    from tinydrop_kernels.ops.attention_reference import relative_position_index

    places = torch.tensor([-1, *range(GRID[0] * GRID[1])])
    assert torch.equal(relative_position_index(places, places, GRID), beit.gen_relative_position_index(GRID))


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("forced", ["reference", "triton"])
def test_one_compilation_for_all_batches(forced, biased, request):
    """Check that calls with different totals, lengths and batch sizes do not recompile."""
    device = request.getfixturevalue("triton").device if forced == "triton" else "cpu"

    @torch.compile(backend="eager", dynamic=True, fullgraph=True)
    def attend(qkv, cu_seqlens, longest, bias):
        return ops.varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, longest, longest, None, bias)

    torch._dynamo.reset()
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([4, 5, 6, 2], [7, 2, 9], [3, 0, 11, 6], [60, 50]):
            qkv = torch.randn(sum(lengths), 3, 2, 16, device=device)
            bias = bias_for(sum(lengths), 2, torch.float32, device) if biased else None
            cu_seqlens, longest = cu_seqlens_of(lengths, device), max(lengths)
            with ops.use_backend(forced):
                out = attend(qkv, cu_seqlens, longest, bias)
            assert_near(out, exact(*qkv.unbind(1), lengths, lengths, None, bias), TOLERANCE[torch.float32])


def test_replays_in_a_cuda_graph(attention_backend):
    """Check that a CUDA graph captured on one batch is right for the values and segments of another."""
    if attention_backend.device == "cpu" or SANITIZED:
        pytest.skip("CUDA graphs need a GPU, and an allocator that keeps memory")
    lengths = [33, 0, 65, 1, 17]
    operator, cu_seqlens = ops.OPERATORS["varlen_attention"], cu_seqlens_of(lengths, "cuda")
    qkv = projections(lengths, 3, 64, torch.float16, "cuda")
    arguments = (*qkv, cu_seqlens, cu_seqlens, 65, 65, None, None, None, (1, 1), 0)
    implementation = operator.choose(*arguments)
    implementation.run(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = implementation.run(*arguments)
    for tensor, other in zip(qkv, projections(lengths, 3, 64, torch.float16, "cuda"), strict=True):
        tensor.copy_(other)
    cu_seqlens.copy_(cu_seqlens_of(lengths[::-1], "cuda"))
    graph.replay()
    assert_near(out, exact(*qkv, lengths[::-1], lengths[::-1]), TOLERANCE[torch.float16])


BAD = {
    "query": ({"query": torch.randn(9, 32)}, ValueError, "query: got (9, 32), expected (total, heads, head_dim)"),
    "no columns": (
        {"query": torch.randn(9, 2, 0)},
        ValueError,
        "query: got (9, 2, 0), expected (total, heads, head_dim)",
    ),
    "integers": (
        {"query": torch.zeros(9, 2, 16).int()},
        TypeError,
        "query: got torch.int32, expected floating point",
    ),
    "device": (
        {"key": torch.randn(9, 2, 16, device="meta")},
        ValueError,
        "key: got it on meta, expected query's cpu",
    ),
    "no batch": (
        {"cu_seqlens_q": torch.empty(0).int()},
        ValueError,
        "cu_seqlens_q: got torch.int32 (0,), expected int32 (segments + 1,), the same for queries and keys",
    ),
    "key": ({"key": torch.randn(9, 1, 16)}, ValueError, "key: got (9, 1, 16), expected (total_k, 2, 16)"),
    "rows of keys": ({"key": torch.randn(9, 16)}, ValueError, "key: got (9, 16), expected (total_k, 2, 16)"),
    "value": ({"value": torch.randn(8, 2, 16)}, ValueError, "value: got (8, 2, 16), expected (9, 2, 16)"),
    "dtype": (
        {"value": torch.randn(9, 2, 16).half()},
        TypeError,
        "value: got torch.float16, expected query's torch.float32",
    ),
    "cu_seqlens_q": (
        {"cu_seqlens_q": torch.tensor([0, 4, 9])},
        ValueError,
        "cu_seqlens_q: got torch.int64 (3,), expected int32 (segments + 1,), the same for queries and keys",
    ),
    "cu_seqlens_k": (
        {"cu_seqlens_k": torch.tensor([0, 9]).int()},
        ValueError,
        "cu_seqlens_k: got torch.int32 (2,), expected int32 (segments + 1,), the same for queries and keys",
    ),
    "skip_keys": ({"skip_keys": -1}, ValueError, "skip_keys: got -1, expected a number >= 0, and 0 with a bias"),
}
BAD_BIAS = {
    "table": ({"table": torch.randn(5, 2)}, ValueError, "bias.table: got (5, 2), expected (117, 2) or (120, 2)"),
    "integers": (
        {"table": torch.ones(117, 2).int()},
        TypeError,
        "bias.table: got torch.int32, expected floating point",
    ),
    "positions": (
        {"positions": torch.zeros(9)},
        ValueError,
        "bias.positions: got torch.float32 (9,), expected int32 (9,)",
    ),
    "device": (
        {"positions": torch.zeros(9, device="meta").int()},
        ValueError,
        "bias.positions: got it on meta, expected query's cpu",
    ),
}


def refusal(error, **changes):
    cu_seqlens = cu_seqlens_of([4, 5])
    given = dict(zip(("query", "key", "value"), torch.randn(3, 9, 2, 16), strict=True))
    given |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens} | changes
    with pytest.raises(error) as raised:
        ops.varlen_attention(**given, max_seqlen_q=5, max_seqlen_k=5)
    return str(raised.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    assert refusal(error, **change) == message


@pytest.mark.parametrize("case", BAD_BIAS)
def test_bad_bias(case):
    change, error, message = BAD_BIAS[case]
    assert refusal(error, bias=bias_for(9, 2, torch.float32, "cpu")._replace(**change)) == message


def test_a_bias_is_of_queries_that_are_the_keys():
    bias = bias_for(9, 2, torch.float32, "cpu")
    message = "skip_keys: got 1, expected a number >= 0, and 0 with a bias"
    assert refusal(ValueError, bias=bias, skip_keys=1) == message
    fewer = {name: torch.randn(8, 2, 16) for name in ("key", "value")}
    assert refusal(ValueError, bias=bias, **fewer) == "key: got 8 rows, expected query's 9 because of bias"
