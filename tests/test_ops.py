"""The reference operators against loops over single images, written from the contracts and sharing no code with them.

Grids: 1 x 1 (one token), 5 x 7 (primes, not square), 14 x 14 (the usual), from maps that are smaller, equal and larger.
Batches hold images that exit, keep one patch, some, and all.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tinydrop_kernels import ops

GRIDS = [(1, 1), (5, 7), (14, 14)]
MAPS = [(1, 1), (3, 2), (7, 7), (16, 16)]


def logits_of(confidences: list[float], classes: int = 5) -> torch.Tensor:
    """Logits whose max softmax is as asked for."""
    return torch.stack(
        [torch.tensor([math.log(c)] + [math.log((1 - c) / (classes - 1))] * (classes - 1)) for c in confidences]
    )


def best(scores: list[float], count: int) -> list[int]:
    """Highest scores first, ties to the lower index, NaN last; then in raster order."""
    rank = sorted(range(len(scores)), key=lambda i: (-math.inf if math.isnan(scores[i]) else scores[i]) * -1)
    return sorted(rank[:count])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_select_tokens(grid, size, dtype):
    batch, channels, classes = 6, 11, 5
    logits = logits_of([0.21, 0.4, 0.6, 0.79, 0.81, 0.99]).to(dtype)
    features = torch.randn(batch, channels, *size).to(dtype).flatten(2).transpose(1, 2)
    weight = torch.randn(classes, channels).to(dtype)
    selection = ops.select_tokens(logits, features, weight, size, grid, 0.8, 2.0, 0.1)

    num_patches = grid[0] * grid[1]
    for b in range(batch):
        confidence = logits[b].float().softmax(0).max()
        cam = (features[b].float() @ weight[logits[b].argmax()].float()).relu().view(1, 1, *size)
        cam = F.interpolate(cam, size=grid, mode="bilinear", align_corners=False)[0, 0]
        torch.testing.assert_close(selection.confidence[b], confidence)
        torch.testing.assert_close(selection.saliency[b], cam, atol=1e-5, rtol=1e-5)
        keep = min(1.0, max(0.1, 1 - (confidence.item() / 0.8) ** 2))
        count = 0 if confidence > 0.8 else math.ceil(num_patches * keep - 1e-3)
        kept = best(selection.saliency[b].flatten().tolist(), count)
        assert selection.counts[b] == count
        assert selection.indices[b].tolist() == kept + [-1] * (num_patches - count)


def test_ties_go_to_the_lower_index():
    saliency = torch.zeros(1, 4, 4)
    saliency[0, 2, 1] = 1.0
    selection = ops.select_from_saliency(logits_of([0.5]), saliency, (4, 4), None, 0.0, 0.25)
    assert selection.indices[0, :4].tolist() == [0, 1, 2, 9]


def test_nan_saliency_ranks_last():
    saliency = torch.full((1, 2, 2), float("nan"))
    saliency[0, 1, 1] = -5.0
    selection = ops.select_from_saliency(logits_of([0.5]), saliency, (2, 2), None, 0.0, 0.5)
    assert selection.indices[0].tolist() == [0, 3, -1, -1]


def test_nan_image_keeps_everything_and_leaves_the_others_alone():
    logits = logits_of([0.5, 0.5])
    logits[0] = float("nan")
    features = torch.randn(2, 4, 3)
    features[0] = float("nan")
    selection = ops.select_tokens(logits, features, torch.randn(5, 3), (2, 2), (4, 4), 0.8, 2.0, 0.1)
    assert selection.counts.tolist()[0] == 16
    alone = ops.select_tokens(logits[1:], features[1:], torch.randn(5, 3), (2, 2), (4, 4), 0.8, 2.0, 0.1)
    assert alone.counts[0] == selection.counts[1]


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 16, 1], [0, 0], [16], [0, 5]], ids=str)
def test_pack(counts, prefix, summary):
    cu_seqlens, max_seqlen, total = ops.pack(torch.tensor(counts, dtype=torch.int32), 16, prefix, summary)
    lengths = [c and c + prefix + (summary and c < 16) for c in counts]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert (max_seqlen, total) == (max(lengths), sum(lengths))


def ragged_case(counts, num_patches, prefix, summary):
    """Random kept indices for the counts, and their packing."""
    indices = torch.full((len(counts), num_patches), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        indices[b, :count] = torch.randperm(num_patches)[:count].sort().values.int()
    cu_seqlens, _, total = ops.pack(torch.tensor(counts, dtype=torch.int32), num_patches, prefix, summary)
    return indices, cu_seqlens, total


def packed_by_hand(embedded, prefix, indices, summary):
    """Packed tokens from fully embedded patches ``(batch, T, dim)`` and prefix rows, image by image."""
    rows = []
    for image, row in zip(embedded, indices, strict=True):
        kept = row[row >= 0].long()
        if len(kept):
            dropped = [i for i in range(len(image)) if i not in kept.tolist()]
            mean = image[dropped].mean(0, keepdim=True) if summary and dropped else image[:0]
            rows.append(torch.cat([prefix, image[kept], mean]))
    return torch.cat(rows) if rows else embedded.new_empty(0, embedded.shape[2])


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
COUNTS = [[6, 0, 35, 1, 17], [0, 0], [35, 35], [1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_embed_tokens(counts, prefix, summary, dtype, memory_format):
    dim, patch = 13, (3, 2)  # a 5 x 7 grid; one row and one column of pixels beyond the last patch
    images = torch.randn(len(counts), 3, 16, 15).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(dim, 3, *patch).to(dtype), torch.randn(dim).to(dtype)
    pos_embed, rows = torch.randn(35, dim).to(dtype), torch.randn(prefix, dim).to(dtype)
    indices, cu_seqlens, total = ragged_case(counts, 35, prefix, summary)
    out = ops.embed_tokens(images, weight, bias, rows, pos_embed, indices, cu_seqlens, total, summary)

    embedded = F.conv2d(images.double(), weight.double(), bias.double(), stride=patch).flatten(2).transpose(1, 2)
    wanted = packed_by_hand(embedded + pos_embed.double(), rows.double(), indices, summary)
    assert out.dtype == dtype and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, atol=10 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("per_image_prefix", [False, True])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_gather_tokens(counts, per_image_prefix, summary, positions):
    tokens = torch.randn(len(counts), 9, 35).transpose(1, 2)
    prefix = torch.randn(2, 9)
    pos_embed = torch.randn(35, 9) if positions else None
    indices, cu_seqlens, total = ragged_case(counts, 35, 2, summary)
    given = prefix.expand(len(counts), -1, -1) if per_image_prefix else prefix
    out = ops.gather_tokens(tokens, given, pos_embed, indices, cu_seqlens, total, summary)
    wanted = packed_by_hand(tokens + (pos_embed if positions else 0), prefix, indices, summary)
    torch.testing.assert_close(out, wanted)


LENGTHS = [[1], [0, 0, 5], [7, 0, 1, 31, 16], [4, 4, 4], [197, 50, 3], [0]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head_dim", [16, 72])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_varlen_attention(lengths, head_dim, dtype, large):
    heads, total = 3, sum(lengths)
    qkv = torch.randn(total, 3, heads, head_dim)
    qkv[:, 0] *= 30 if large else 1  # scores in the hundreds: one key takes nearly all, nothing overflows
    qkv = qkv.to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    out = ops.varlen_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    assert out.shape == (total, heads, head_dim) and out.dtype == dtype
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        q, k, v = qkv[start:end].double().unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
        wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        atol = TOLERANCE[dtype] * (50 if large else 2)
        torch.testing.assert_close(out[start:end].double(), wanted, atol=atol, rtol=TOLERANCE[dtype])


def test_varlen_attention_with_other_queries():
    query, key, value = torch.randn(4, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    cu_q, cu_k = torch.tensor([0, 2, 4]).int(), torch.tensor([0, 9, 9]).int()
    out = ops.varlen_attention(query, key, value, cu_q, cu_k, 2, 9, scale=0.5)
    scores = torch.einsum("qhd,khd->hqk", query[:2], key) * 0.5
    torch.testing.assert_close(out[:2], torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    assert (out[2:] == 0).all(), "queries without keys"


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("mode", ["first", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segment_pool(lengths, skip, mode, dtype):
    tokens = torch.randn(sum(lengths), 6).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    pooled = ops.segment_pool(tokens, cu_seqlens, mode, skip)
    reduce = {"first": lambda x: x[0], "mean": lambda x: x.double().mean(0), "max": lambda x: x.amax(0)}[mode]
    for b, length in enumerate(lengths):
        segment = tokens[cu_seqlens[b] : cu_seqlens[b + 1]][skip:]
        wanted = reduce(segment) if length > skip else torch.zeros(6)
        torch.testing.assert_close(pooled[b].double(), wanted.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_segment_pool_refuses_other_modes():
    with pytest.raises(ValueError, match="^mode: got 'median'"):
        ops.segment_pool(torch.randn(3, 2), torch.tensor([0, 3]).int(), "median")


def opcheck_cases():
    """Arguments of every registered operator; images that exit, keep some and keep all."""
    counts = torch.tensor([3, 0, 16], dtype=torch.int32)
    indices, cu_seqlens, total = ragged_case(counts.tolist(), 16, 1, True)
    qkv = torch.randn(total, 3, 2, 8)
    law = (0.8, 2.0, 0.1)
    images, prefix, pos_embed = torch.randn(3, 3, 8, 8), torch.randn(1, 6), torch.randn(16, 6)
    return {
        "select_tokens": (torch.randn(3, 5), torch.randn(3, 4, 7), torch.randn(5, 7), (2, 2), (4, 4), *law),
        "select_from_saliency": (torch.randn(3, 5), torch.rand(3, 4, 4), (4, 4), *law),
        "pack": (counts, 16, 1, True),
        "embed_tokens": (images, torch.randn(6, 3, 2, 2), None, prefix, pos_embed, indices, cu_seqlens, total, True),
        "gather_tokens": (torch.randn(3, 16, 6), prefix, pos_embed, indices, cu_seqlens, total, True),
        "varlen_attention": (
            *(*qkv.unbind(1), cu_seqlens, cu_seqlens, 17, 17, 0.3),
            *(torch.randn(49 + 3, 2), torch.randint(-1, 16, (total,)).int(), (4, 4)),
        ),
        "segment_pool": (torch.randn(total, 6), cu_seqlens, "mean", 1),
    }


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.tinydrop, name).default, opcheck_cases()[name])


def test_backend_can_be_forced(monkeypatch):
    assert ops.choose_backend("cuda")[0] == "triton" and ops.choose_backend("cpu")[0] == "reference"
    with ops.use_backend("reference"):
        assert ops.choose_backend("cuda")[0] == "reference"
    monkeypatch.setenv("TINYDROP_BACKEND", "reference")
    assert ops.choose_backend("cuda")[0] == "reference"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use_backend("triton"):
        assert ops.choose_backend("cuda")[0] == "triton"
        with pytest.raises(RuntimeError, match="^backend: triton is forced, but no Triton for cpu"):
            ops.choose_backend("cpu")
    monkeypatch.setenv("TINYDROP_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="^TINYDROP_BACKEND: got 'cudnn'"):
        ops.choose_backend("cuda")
    with pytest.raises(ValueError, match="^backend: got 'fast'"), ops.use_backend("fast"):
        pass
