"""The kernels of embedding, gathering and pooling in Triton's interpreter, against the reference operators in float64.

Batches mix images that exit, keep one patch, some, all but one (a summary of one patch, and a segment as long as one
that keeps all) and all.
"""

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs

if not knobs.runtime.interpret:
    pytest.skip("Triton compiles here: set TRITON_INTERPRET=1", allow_module_level=True)

from tinydrop_kernels.ops import pack, reference
from tinydrop_kernels.ops.kernels import embed_tokens, gather_tokens, segment_pool

MIXED = [6, 0, 35, 1, 34, 17]
# A unit in the last place: sums are in float32 and are rounded once, summary rows three times on their way.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = list(TOLERANCE)


def ragged_case(counts, num_patches, prefix, summary):
    """Random kept indices for the counts, and their packing."""
    indices = torch.full((len(counts), num_patches), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        indices[b, :count] = torch.randperm(num_patches)[:count].sort().values.int()
    cu_seqlens, _, total = pack(torch.tensor(counts, dtype=torch.int32), num_patches, prefix, summary)
    return indices, cu_seqlens, total


def assert_matches(out, kernel_reference, *arguments):
    """Compare a kernel's result with what the reference makes of the same arguments in float64."""
    exact = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments]
    wanted = kernel_reference(*exact)
    assert out.dtype == arguments[0].dtype and out.shape == wanted.shape
    torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE[out.dtype], rtol=TOLERANCE[out.dtype])


def check_embed(images, grid, patch, counts, dim=13, prefix=1, summary=False, bias=True, positions=True):
    """Compare the kernel with the reference; returns the arguments and the kernel's result."""
    dtype, num_patches = images.dtype, grid[0] * grid[1]
    weight = (torch.randn(dim, images.shape[1], *patch) / (images.shape[1] * patch[0] * patch[1]) ** 0.5).to(dtype)
    offset = torch.randn(dim).to(dtype) if bias else None
    pos_embed = torch.randn(num_patches, dim).to(dtype) if positions else None
    rows = torch.randn(prefix, dim).to(dtype)
    arguments = images, weight, offset, rows, pos_embed, *ragged_case(counts, num_patches, prefix, summary), summary
    out = embed_tokens.launch(*arguments)
    assert_matches(out, reference.embed_tokens, *arguments)
    return arguments, out


# A grid of 5 x 7 (primes) and patches of 2 x 3, with pixels beyond the last whole patch; dim 13 fills no tile.
@pytest.mark.parametrize("counts", [MIXED, [0, 0], [35, 35], [1], [0, 0, 0, 5, 0]], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments(counts, prefix, summary, dtype):
    images = torch.randn(len(counts), 3, 11, 23).to(dtype)
    check_embed(images, (5, 7), (2, 3), counts, prefix=prefix, summary=summary)


# 14: 588 pixels, no multiple of the tile. 8 x 16: not square. 32: many steps. One channel: channels-last is NCHW.
@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (16, 16), (8, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_patch_sizes(patch, channels, memory_format, summary, dtype):
    images = torch.randn(3, channels, 2 * patch[0] + 1, 3 * patch[1] + 2)
    images = images.to(dtype).contiguous(memory_format=memory_format)
    check_embed(images, (2, 3), patch, [2, 6, 5], summary=summary)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("summary", [False, True])
def test_without_bias_or_positions(bias, positions, summary):
    check_embed(torch.randn(6, 3, 10, 14), (5, 7), (2, 2), MIXED, summary=summary, bias=bias, positions=positions)


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("counts", [[1], [1, 0, 1]], ids=str)
def test_one_patch(counts, summary):
    check_embed(torch.randn(len(counts), 3, 4, 4), (1, 1), (4, 4), counts, summary=summary)


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[::2, :, 3:13, 1:15],
        lambda x: x.permute(0, 2, 3, 1)[:, :, :, :3].contiguous().permute(0, 3, 1, 2)[::2, :, :10, :14],
        lambda x: x.contiguous(memory_format=torch.channels_last)[::2, 1:4, :10, :14],  # pixels of 3 of 5 channels
        lambda x: x[::2, :, :10, :14].transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[::2, :1, :10, :14].expand(-1, 3, -1, -1),  # a grey image
        lambda x: x[:1, :, :10, :14].expand(6, -1, -1, -1),
    ],
    ids=["sliced", "channels-last", "some channels", "transposed", "grey", "one image"],
)
def test_strides(view, summary):
    images = view(torch.randn(12, 5, 16, 16))
    check_embed(images, (5, 7), (2, 2), MIXED, summary=summary)


@pytest.mark.parametrize("total", [100, 100_000])
@pytest.mark.parametrize("dim", [192, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles(dim, total, dtype, monkeypatch):
    """Every choice of tiles, over images that begin and end within them."""
    tiles = embed_tokens.tile_sizes(dtype, dim, total)
    assert (tiles["BLOCK_ROWS"], tiles["BLOCK_COLUMNS"]) == (
        (64, 64) if total == 100 else (128, 64 if dim == 192 else 128)
    )
    monkeypatch.setattr(embed_tokens, "tile_sizes", lambda *_: tiles)
    images = torch.randn(9, 3, 10, 14).to(dtype)
    check_embed(images, (5, 7), (2, 2), [35, 0, 35, 20, *[1] * 4, 35], dim=dim, summary=True)


def test_dropped_pixels_are_never_read():
    arguments, wanted = check_embed(torch.randn(6, 3, 10, 14), (5, 7), (2, 2), MIXED)
    images, *others, indices, _, _, _ = arguments
    dropped = torch.ones(6, 36, dtype=torch.bool)
    dropped.scatter_(1, torch.where(indices >= 0, indices, 35).long(), False)
    dropped = dropped[:, :35].view(6, 1, 5, 7).repeat_interleave(2, 2).repeat_interleave(2, 3)
    poisoned = images.masked_fill(dropped, float("nan"))
    out = embed_tokens.launch(poisoned, *others, *arguments[5:])
    assert out.isfinite().all()
    torch.testing.assert_close(out, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("counts", [MIXED, [0, 0], [35]], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("per_image_prefix", [False, True])
@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens(counts, prefix, per_image_prefix, summary, positions, dtype):
    tokens = torch.randn(len(counts), 35, 13).to(dtype)
    rows = torch.randn(*([len(counts)] if per_image_prefix else []), prefix, 13).to(dtype)
    pos_embed = torch.randn(35, 13).to(dtype) if positions else None
    arguments = tokens, rows, pos_embed, *ragged_case(counts, 35, prefix, summary), summary
    assert_matches(gather_tokens.launch(*arguments), reference.gather_tokens, *arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens_with_strides(dtype):
    """Tokens of a feature map, prefix rows in front of others; what is only moved stays exact."""
    tokens = torch.randn(6, 300, 35).to(dtype).transpose(1, 2)
    prefix = torch.randn(6, 40, 300).to(dtype)[:, :2]
    arguments = tokens, prefix, None, *ragged_case(MIXED, 35, 2, False), False
    torch.testing.assert_close(gather_tokens.launch(*arguments), reference.gather_tokens(*arguments), atol=0, rtol=0)


# 31, 32, 33: around the tile of 32 rows. 100 columns: more than one tile, and not full.
@pytest.mark.parametrize("lengths", [[1], [0, 0, 5], [7, 0, 1, 31, 32, 33, 70], [0]], ids=str)
@pytest.mark.parametrize("skip", [0, 1, 5])
@pytest.mark.parametrize("mode", ["first", "mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segment_pool(lengths, skip, mode, dtype):
    tokens = torch.randn(sum(lengths), 200).to(dtype)[:, ::2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    arguments = tokens, cu_seqlens, mode, skip
    assert_matches(segment_pool.launch(*arguments), reference.segment_pool, *arguments)


@pytest.mark.parametrize("mode", ["first", "mean", "max"])
def test_segment_pool_of_nan_and_infinity(mode):
    tokens = torch.randn(80, 6)
    tokens[3, 0] = tokens[50, 1] = tokens[79, 2] = float("nan")
    tokens[5, 3], tokens[:40, 4] = float("inf"), float("-inf")
    cu_seqlens = torch.tensor([0, 40, 40, 80]).int()
    out, wanted = (run(tokens, cu_seqlens, mode, 0) for run in (segment_pool.launch, reference.segment_pool))
    torch.testing.assert_close(out, wanted, equal_nan=True)
