"""Attention's Triton kernel against float64, in the interpreter where there is no GPU; and which implementation runs.

Lengths stand on both sides of every tile (16, 32, 64, 128, a loop beyond) and of a tile's rows; 0, 1 and 2 tokens;
ViT's own 50 (a quarter of 14 x 14 and a class token), 99, 197 and 257; 577 and 1370 (384 and 518 pixels) once each.
Heads of 64, the usual; of 8, less than a tile; of 16 and 128; of 72 and 88, which no tile fits.
"""

import pytest
import torch
from attention_oracle import exact
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from tinydrop_kernels import ops
from tinydrop_kernels.ops import attention_backends, cuda, reference
from tinydrop_kernels.ops.attention_arguments import AttentionArguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the norm
LENGTHS = (
    [0, 1, 2, 15, 16, 0],
    [17, 31, 1, 32],
    [33, 49, 0, 50, 63, 64],
    [65, 99, 127, 3, 128],
    [129, 197, 20, 198, 257],
    [0],
    [],
)
GRID = (5, 7)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def projections(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Query, key and value as views of one projection, as timm's attention leaves them."""
    return torch.randn(sum(lengths), 3, heads, head_dim, device=DEVICE).to(dtype).unbind(1)


def bias_for(total: int, heads: int, dtype: torch.dtype, class_token: bool = True) -> ops.RelativeBias:
    """A table and places on GRID for so many tokens, some of them class tokens."""
    rows, columns = GRID
    distances = (2 * rows - 1) * (2 * columns - 1)
    table = torch.randn(heads, distances + 3 * class_token, device=DEVICE).to(dtype).t()
    positions = torch.randint(-1 if class_token else 0, rows * columns, (total,), device=DEVICE).int()
    return ops.RelativeBias(table, positions, GRID)


def in_float64(query, key, value, cu_seqlens_q, cu_seqlens_k, scale=None, bias=None) -> torch.Tensor:
    return exact(query, key, value, cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), scale, bias)


def on_triton(*arguments) -> torch.Tensor:
    with ops.use_backend("triton"):
        return ops.varlen_attention(*arguments)


def assert_near(out: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert out.shape == wanted.shape and out.is_contiguous()
    assert (out.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_ragged_batches(lengths, dtype, biased):
    query, key, value = projections(lengths, 2, 64, dtype)
    cu_seqlens, longest = offsets(lengths), max(lengths, default=0)
    bias = bias_for(sum(lengths), 2, dtype) if biased else None
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, longest, longest, None, bias)
    wanted = in_float64(query, key, value, cu_seqlens, cu_seqlens, None, bias)
    assert out.dtype == dtype
    assert_near(out, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("head_dim", [8, 16, 72, 88, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("lengths", [[7, 0, 16], [31, 5], [99, 130]], ids=str)
def test_head_dims(head_dim, dtype, lengths):
    query, key, value = projections(lengths, 1, head_dim, dtype)
    cu_seqlens, longest = offsets(lengths), max(lengths)
    bias = bias_for(sum(lengths), 1, dtype, class_token=False)
    for given in (None, bias):
        out = on_triton(query, key, value, cu_seqlens, cu_seqlens, longest, longest, 0.3, given)
        assert_near(out, in_float64(query, key, value, cu_seqlens, cu_seqlens, 0.3, given), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [577, 1370])
def test_long_segments(length):
    query, key, value = projections([length, 3], 1, 64, torch.float16)
    cu_seqlens = offsets([length, 3])
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, length, length)
    assert_near(out, in_float64(query, key, value, cu_seqlens, cu_seqlens), TOLERANCE[torch.float16])


@pytest.mark.parametrize("keys", [[5, 0, 12], [40, 0, 64], [197, 0, 70]], ids=str)
@pytest.mark.parametrize("queries", [[1, 1, 1], [2, 3, 0], [20, 4, 17]], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_other_queries_than_keys(queries, keys, head_dim):
    """As attention pools have them: a few latent queries an image. Those of an image without tokens yield zeros."""
    query = torch.randn(2, sum(queries), head_dim, device=DEVICE).transpose(0, 1)
    _, key, value = projections(keys, 2, head_dim, torch.float32)
    cu_seqlens_q, cu_seqlens_k = offsets(queries), offsets(keys)
    out = on_triton(query, key, value, cu_seqlens_q, cu_seqlens_k, max(queries), max(keys))
    assert_near(out, in_float64(query, key, value, cu_seqlens_q, cu_seqlens_k), TOLERANCE[torch.float32])
    assert (out[cu_seqlens_q[1] : cu_seqlens_q[2]] == 0).all()


def test_bounds_may_exceed_the_longest_segment():
    query, key, value = projections([9, 4], 2, 16, torch.float32)
    cu_seqlens = offsets([9, 4])
    wanted = in_float64(query, key, value, cu_seqlens, cu_seqlens)
    for bound in (9, 33, 300):
        assert_near(on_triton(query, key, value, cu_seqlens, cu_seqlens, bound, bound), wanted, 1e-6)


@pytest.mark.parametrize("lengths", [[16], [50], [130]], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_huge_scores_pick_one_key(lengths, dtype):
    """Scores of +-10000: the answer is the value of the one best key, exactly, and nothing overflows."""
    total = sum(lengths)
    query, key, value = projections(lengths, 1, 16, dtype)
    signs = torch.tensor([[1.0 if i >> bit & 1 else -1.0 for bit in range(16)] for i in range(total)], device=DEVICE)
    query, key = ((25 * signs).to(dtype)[:, None] for _ in range(2))  # 16 * 25 * 25 = 10000 with itself
    cu_seqlens = offsets(lengths)
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, total, total, 1.0)
    assert torch.equal(out, value)


@pytest.mark.parametrize("length", [16, 50, 197])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_may_hide_keys(length, dtype):
    """-inf at whole tiles of keys, the first ones among them; where it hides them all, zeros."""
    query, key, value = projections([length], 1, 16, dtype)
    cu_seqlens, places = offsets([length]), torch.arange(length, device=DEVICE).int()
    table = torch.zeros(2 * length - 1, 1, device=DEVICE, dtype=dtype)
    table[length:] = -float("inf")  # keys before the query: each sees itself and what follows
    bias = ops.RelativeBias(table, places, (1, length))
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, length, length, None, bias)
    scores = (query[:, 0].double() @ key[:, 0].double().T * 0.25).masked_fill(places[:, None] > places, -float("inf"))
    assert_near(out[:, 0], scores.softmax(-1) @ value[:, 0].double(), TOLERANCE[dtype])
    nothing = bias._replace(table=torch.full_like(table, -float("inf")))
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, length, length, None, nothing)
    assert (out == 0).all()


def test_strewn_columns():
    query, key, value = (torch.randn(16, 2, 21, device=DEVICE).permute(2, 1, 0) for _ in range(3))
    cu_seqlens = offsets([9, 12])
    out = on_triton(query, key, value, cu_seqlens, cu_seqlens, 12, 12)
    assert_near(out, in_float64(query, key, value, cu_seqlens, cu_seqlens), 1e-6)


@pytest.mark.parametrize("lengths", [[16, 3], [50], [130]], ids=str)
def test_equal_scores_average(lengths):
    query, key, value = projections(lengths, 2, 16, torch.float32)
    cu_seqlens = offsets(lengths)
    out = on_triton(torch.zeros_like(query), key, value, cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    wanted = torch.cat([segment.mean(0, keepdim=True).expand_as(segment) for segment in value.split(lengths)])
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("implementation", ["triton", "segments", "padded"])
def test_nan_stays_in_its_segment(where, implementation):
    tensors = dict(zip(("query", "key", "value"), projections([4, 5, 20], 2, 16, torch.float32), strict=True))
    tensors[where][4:9] = float("nan")
    attend = {"segments": reference.segment_attention, "padded": reference.padded_attention, "triton": on_triton}
    cu_seqlens = offsets([4, 5, 20])
    out = attend[implementation](*tensors.values(), cu_seqlens, cu_seqlens, 20, 20, None, None)
    assert out[:4].isfinite().all() and out[9:].isfinite().all()
    if implementation == "triton":  # the others do as torch's attention does, which answers zeros to some NaN
        assert out[4:9].isnan().all()


def test_a_segment_longer_than_said_is_refused_on_cpu():
    query, key, value = (t.cpu() for t in projections([9, 4], 2, 16, torch.float32))
    cu_seqlens = torch.tensor([0, 9, 13]).int()
    with pytest.raises(ValueError, match="^max_seqlen: got 8, 9, one segment has 9, 9"):
        ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, 8, 9)


def test_rows_behind_the_last_segment():
    """As a padded CUDA graph has them."""
    query, key, value = projections([9, 4], 2, 16, torch.float32)
    cu_seqlens = offsets([9])
    for attend in (reference.padded_attention, on_triton):
        out = attend(query, key, value, cu_seqlens, cu_seqlens, 9, 9, None, None)
        assert_near(out[:9].contiguous(), in_float64(query, key, value, cu_seqlens, cu_seqlens)[:9], 1e-6)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE], ids=str)
def test_both_references(dtype, biased):
    """Segment by segment, which runs on CPU, and padded, which runs where lengths are not to be read back."""
    queries, keys = [2, 0, 7, 3, 0], [2, 4, 7, 0, 0]
    if biased:
        keys = queries
    _, key, value = projections(keys, 2, 16, dtype)
    query, _, _ = projections(queries, 2, 16, dtype)
    bias = bias_for(sum(queries), 2, dtype) if biased else None
    cu_seqlens_q, cu_seqlens_k = offsets(queries), offsets(keys)
    wanted = in_float64(query, key, value, cu_seqlens_q, cu_seqlens_k, 0.2, bias)
    for attend in (reference.segment_attention, reference.padded_attention):
        out = attend(query, key, value, cu_seqlens_q, cu_seqlens_k, 7, 7, 0.2, bias)
        assert out.dtype == dtype
        assert_near(out, wanted, 1e-14 if dtype == torch.float64 else TOLERANCE[dtype])
    empty = offsets([0] * 5)
    for attend in (reference.segment_attention, reference.padded_attention):
        assert (attend(query, key[:0], value[:0], cu_seqlens_q, empty, 7, 0, 0.2, None) == 0).all()


def test_gradients():
    """Of query, key, value and bias, whatever backend is forced, as those of the formula."""
    query, key, value = (t.double().requires_grad_() for t in projections([3, 5], 2, 16, torch.float64))
    bias = bias_for(8, 2, torch.float64)
    bias = bias._replace(table=bias.table.clone().requires_grad_())
    cu_seqlens, wanted_from = offsets([3, 5]), (query, key, value, bias.table)
    with torch.no_grad():
        assert not on_triton(query, key, value, cu_seqlens, cu_seqlens, 5, 5, None, bias).requires_grad
    upstream = torch.randn_like(query)
    wanted = torch.autograd.grad(
        in_float64(query, key, value, cu_seqlens, cu_seqlens, None, bias), wanted_from, upstream
    )
    padded = reference.padded_attention(query, key, value, cu_seqlens, cu_seqlens, 5, 5, None, bias)
    for out in (on_triton(query, key, value, cu_seqlens, cu_seqlens, 5, 5, None, bias), padded):
        torch.testing.assert_close(torch.autograd.grad(out, wanted_from, upstream), wanted)


def test_index_is_timms():
    from timm.models.beit import gen_relative_position_index

    places = torch.tensor([-1, *range(GRID[0] * GRID[1])])
    assert torch.equal(reference.relative_position_index(places, places, GRID), gen_relative_position_index(GRID))


def test_packed_projection():
    qkv = torch.randn(9, 3, 2, 16, device=DEVICE)
    cu_seqlens = offsets([4, 5])
    out = ops.varlen_attention_qkvpacked(qkv, cu_seqlens, 5)
    assert out.shape == (9, 32)
    wanted = ops.varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, 5, 5)
    assert torch.equal(out, wanted.flatten(1))
    with pytest.raises(ValueError, match=r"^qkv: got \(9, 2, 2, 16\), accepted is \(total, 3, heads, head_dim\)"):
        ops.varlen_attention_qkvpacked(qkv[:, :2], cu_seqlens, 5)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_one_compilation_for_all_batches(biased):
    """Totals, lengths and batch sizes differ from call to call; nothing is compiled again."""

    @torch.compile(backend="eager", dynamic=True, fullgraph=True)
    def attend(qkv, cu_seqlens, longest, bias):
        return ops.varlen_attention_qkvpacked(qkv, cu_seqlens, longest, None, bias)

    torch._dynamo.reset()
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([4, 5, 6, 2], [7, 2, 9], [3, 0, 11, 6], [60, 50]):
            qkv = torch.randn(sum(lengths), 3, 2, 16, device=DEVICE)
            given = (qkv, offsets(lengths), max(lengths), bias_for(sum(lengths), 2, torch.float32) if biased else None)
            wanted = ops.varlen_attention_qkvpacked(*given[:3], None, given[3])
            assert torch.equal(attend(*given), wanted)


BAD = {
    "query": (
        {"query": torch.randn(9, 32)},
        ValueError,
        r"query: got \(9, 32\), accepted is \(total, heads, head_dim\)",
    ),
    "integers": ({"query": torch.zeros(9, 2, 16).int()}, TypeError, "query: got torch.int32, accepted is floating"),
    "device": (
        {"key": torch.randn(9, 2, 16, device="meta")},
        ValueError,
        "key: got it on meta, accepted is query's cpu",
    ),
    "no batch": ({"cu_seqlens_q": torch.empty(0).int()}, ValueError, r"cu_seqlens_q: got torch.int32 \(0,\)"),
    "key": ({"key": torch.randn(9, 1, 16)}, ValueError, r"key: got \(9, 1, 16\), accepted is \(total_k, \*\(2, 16\)\)"),
    "value": ({"value": torch.randn(8, 2, 16)}, ValueError, r"value: got \(8, 2, 16\)"),
    "dtype": ({"value": torch.randn(9, 2, 16).half()}, TypeError, "value: got torch.float16, accepted is query's"),
    "cu_seqlens_q": ({"cu_seqlens_q": torch.tensor([0, 4, 9])}, ValueError, "cu_seqlens_q: got torch.int64"),
    "cu_seqlens_k": ({"cu_seqlens_k": torch.tensor([0, 9]).int()}, ValueError, r"cu_seqlens_k: got torch.int32 \(2,\)"),
}
BAD_BIAS = {
    "table": ({"table": torch.randn(5, 2)}, r"bias.table: got \(5, 2\), accepted is \(117, 2\) or \(120, 2\)"),
    "positions": ({"positions": torch.zeros(9)}, r"bias.positions: got torch.float32 \(9,\), accepted is int32 \(9,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    cu_seqlens = torch.tensor([0, 4, 9]).int()
    given = dict(zip(("query", "key", "value"), torch.randn(3, 9, 2, 16), strict=True))
    given |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens} | change
    with pytest.raises(error, match=f"^{message}"):
        ops.varlen_attention(**given, max_seqlen_q=5, max_seqlen_k=5)


@pytest.mark.parametrize("case", BAD_BIAS)
def test_bad_bias(case):
    change, message = BAD_BIAS[case]
    bias = bias_for(9, 2, torch.float32)._replace(**change)
    qkv, cu_seqlens = torch.randn(9, 3, 2, 16), torch.tensor([0, 4, 9]).int()
    with pytest.raises(ValueError, match=f"^{message}"):
        ops.varlen_attention_qkvpacked(qkv, cu_seqlens, 5, None, bias)


def first_that_fits(head_dim: int, dtype: torch.dtype, biased: bool = False) -> str:
    """What would run on CUDA, where there need not be any."""
    with FakeTensorMode():
        query, key, value = torch.empty(9, 3, 2, head_dim, dtype=dtype, device="cuda").unbind(1)
        bias = (torch.empty(120, 2, dtype=dtype, device="cuda"), torch.empty(9, device="cuda").int(), GRID)
        arguments = (query, key, value, None, None, 9, 9, None, *(bias if biased else ()))
        return attention_backends.choose(AttentionArguments(*arguments)).name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_which_implementation_runs(monkeypatch):
    assert first_that_fits(64, torch.bfloat16) == "triton"
    assert first_that_fits(64, torch.float64) == "reference"
    assert first_that_fits(256, torch.float16) == "torch"
    assert first_that_fits(256, torch.float32) == "reference"
    assert first_that_fits(256, torch.float16, biased=True) == "reference"
    with ops.use_backend("reference"):
        assert first_that_fits(64, torch.bfloat16) == "reference"
    monkeypatch.setattr(cuda, "available", lambda: False)
    with ops.use_backend("cuda"), pytest.raises(RuntimeError, match="^backend: cuda is forced, but the CUDA"):
        attention_backends.preference("cuda")
    monkeypatch.setattr(cuda, "available", lambda: True)
    with ops.use_backend("cuda"):
        assert attention_backends.preference("cuda")[0].name == "cuda"
        with pytest.raises(RuntimeError, match="has nothing for cpu"):
            attention_backends.preference("cpu")
