"""Tests of embedding and gathering on every backend, against a convolution in float64 and loops.

Batches mix images that exit and images that keep one patch, some patches, all but one, and all.
"""

import pytest
import torch
import torch.nn.functional as F

from tinydrop_kernels import ops

from .cases import DTYPES, GPU, packed_by_hand, ragged, tolerance

MIXED = [6, 0, 35, 1, 34, 17]
COUNTS = [MIXED, [0, 0], [35, 35], [1], [0, 0, 0, 5, 0]]


def assert_rows(out, wanted, weight):
    """Assert that the rows are close to float64. Two roundings are allowed: of the projection and of the sum."""
    dtype = weight.dtype
    bound = tolerance(dtype, weight[0].numel()) + torch.finfo(dtype).eps
    assert out.dtype == dtype and out.shape == wanted.shape and out.is_contiguous()
    torch.testing.assert_close(out.double().cpu(), wanted, atol=bound, rtol=bound)


def check_embed(images, grid, patch, counts, dim=13, prefix=1, bias=True, positions=True, **layout):
    """Check ``embed_tokens`` on these images and return its arguments and result."""
    dtype, device, patches = images.dtype, images.device, grid[0] * grid[1]
    weight = torch.randn(dim, images.shape[1], *patch) / (images.shape[1] * patch[0] * patch[1]) ** 0.5
    offset = torch.randn(dim, device=device).to(dtype) if bias else None
    pos_embed = torch.randn(patches, dim, device=device).to(dtype) if positions else None
    weight, rows = weight.to(device, dtype), torch.randn(prefix, dim, device=device).to(dtype)
    indices, cu_seqlens, total = ragged(counts, patches, prefix, device, **layout)
    arguments = (images, weight, offset, rows, pos_embed, indices, cu_seqlens, total)
    out = ops.embed_tokens(*arguments)
    exact = [None if t is None else t.double().cpu() for t in arguments[:5]]
    embedded = F.conv2d(exact[0], exact[1], exact[2], stride=patch).flatten(2).transpose(1, 2)
    assert embedded.shape[1] == patches
    assert_rows(out, packed_by_hand(embedded + (exact[4] if positions else 0), exact[3], indices), weight)
    return arguments, out


# The grid is 5 x 7 (primes) and patches are 2 x 3. There are pixels beyond the last whole patch. dim 13 fills no tile.
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_segments(backend, counts, prefix, dtype):
    images = torch.randn(len(counts), 3, 11, 23, device=backend.device).to(dtype)
    check_embed(images, (5, 7), (2, 3), counts, prefix=prefix)


# Patches of 14 x 14 have 588 values, no multiple of the tile. 8 x 16 is not square, and 32 x 32 takes many steps. With
# one channel, channels-last equals NCHW.
@pytest.mark.parametrize("patch", [(8, 8), (14, 14), (8, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_patch_sizes(backend, patch, channels, memory_format, dtype):
    images = torch.randn(3, channels, 2 * patch[0] + 1, 3 * patch[1] + 2, device=backend.device)
    images = images.to(dtype).contiguous(memory_format=memory_format)
    check_embed(images, (2, 3), patch, [2, 6, 5])


# The geometries of real models run only on a GPU, because each geometry compiles its own kernel.
MODELS = [((37, 37), (14, 14), 384), ((14, 14), (16, 16), 768), ((16, 12), (16, 16), 192)] if GPU else []


@pytest.mark.parametrize(("grid", "patch", "dim"), [((5, 7), (8, 8), 40), ((3, 2), (32, 32), 200), *MODELS], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geometries(backend, grid, patch, dim, memory_format, dtype):
    patches = grid[0] * grid[1]
    images = torch.randn(5, 3, grid[0] * patch[0] + 3, grid[1] * patch[1] + 1, device=backend.device)
    counts = [patches // 5 + 1, 0, patches, 1, patches - 1]
    check_embed(images.to(dtype).contiguous(memory_format=memory_format), grid, patch, counts, dim, prefix=5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", [False, True])
def test_without_bias_or_positions(backend, bias, positions):
    images = torch.randn(6, 3, 10, 14, device=backend.device)
    check_embed(images, (5, 7), (2, 2), MIXED, bias=bias, positions=positions)


@pytest.mark.parametrize("counts", [[1], [1, 0, 1]], ids=str)
def test_one_patch(backend, counts):
    check_embed(torch.randn(len(counts), 3, 4, 4, device=backend.device), (1, 1), (4, 4), counts)


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
def test_strides_of_images(backend, view):
    check_embed(view(torch.randn(12, 5, 16, 16, device=backend.device)), (5, 7), (2, 2), MIXED)


def test_strides_of_parameters(backend):
    """Check a channels-last weight, and bias, prefix rows and positions that are non-contiguous views."""
    device, (indices, cu_seqlens, total) = backend.device, ragged(MIXED, 35, 2, backend.device)
    images, weight = torch.randn(6, 3, 10, 14, device=device), torch.randn(13, 3, 2, 2, device=device) / 12**0.5
    weight = weight.contiguous(memory_format=torch.channels_last)
    prefix, pos_embed = (torch.randn(13, rows, device=device).t() for rows in (2, 35))
    bias = torch.randn(13, 2, device=device)[:, 1]
    out = ops.embed_tokens(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total)
    embedded = F.conv2d(images.double().cpu(), weight.double().cpu(), bias.double().cpu(), stride=2)
    embedded = embedded.flatten(2).transpose(1, 2) + pos_embed.double().cpu()
    assert_rows(out, packed_by_hand(embedded, prefix.double().cpu(), indices), weight)


def test_patches_in_any_order(backend):
    """Check patches that are not in raster order; Swin orders them cell by cell."""
    device, (indices, cu_seqlens, total) = backend.device, ragged(MIXED, 35, 0, backend.device)
    for row, count in zip(indices, MIXED, strict=True):
        row[:count] = row[:count][torch.randperm(count, device=device)]
    images, weight = torch.randn(6, 3, 10, 14, device=device), torch.randn(13, 3, 2, 2, device=device) / 12**0.5
    prefix = torch.empty(0, 13, device=device)
    out = ops.embed_tokens(images, weight, None, prefix, None, indices, cu_seqlens, total)
    embedded = F.conv2d(images.double().cpu(), weight.double().cpu(), stride=2).flatten(2).transpose(1, 2)
    assert_rows(out, packed_by_hand(embedded, prefix.double().cpu(), indices), weight)


# Indices of a part: rows cut from those of a larger grid, rows with fewer columns than the grid has patches, and rows
# with just enough columns for the kept patches.
@pytest.mark.parametrize(("width", "gap"), [(35, 14), (17, 0), (6, 1)])
def test_indices_of_any_row_stride(backend, width, gap):
    counts, device = [6, 0, 1, min(17, width)], backend.device
    images = torch.randn(4, 3, 10, 14, device=device)
    check_embed(images, (5, 7), (2, 2), counts, width=width, gap=gap)
    tokens, prefix = torch.randn(4, 35, 13, device=device), torch.randn(4, 2, 13, device=device)
    indices, cu_seqlens, total = ragged(counts, 35, 2, device, width, gap)
    out = ops.gather_tokens(tokens, prefix, indices, cu_seqlens, total)
    assert torch.equal(out.cpu(), packed_by_hand(tokens.cpu(), prefix.cpu(), indices))


def test_indices_with_columns_apart(backend):
    indices, cu_seqlens, total = ragged(MIXED, 35, 1, backend.device)
    apart = indices.t().contiguous().t()
    tokens, prefix = torch.randn(6, 35, 5, device=backend.device), torch.randn(6, 1, 5, device=backend.device)
    wanted = packed_by_hand(tokens.cpu(), prefix.cpu(), indices)
    assert torch.equal(ops.gather_tokens(tokens, prefix, apart, cu_seqlens, total).cpu(), wanted)
    images, weight = torch.randn(6, 3, 10, 14, device=backend.device), torch.randn(5, 3, 2, 2, device=backend.device)
    given, out = (
        ops.embed_tokens(images, weight, None, prefix[0], None, i, cu_seqlens, total) for i in (indices, apart)
    )
    assert torch.equal(given, out)


# Totals below and above the number of tiles that fills a GPU, and widths that 128 divides or does not divide.
@pytest.mark.parametrize("total", [100, 100_000])
@pytest.mark.parametrize("dim", [192, 384])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles(triton, dim, total, dtype, monkeypatch):
    """Check every choice of tiles on images that begin and end within a tile."""
    from tinydrop_kernels.ops.kernels import embed

    is_large = embed.fills_a_gpu(total, dim)
    tiles = embed.tile_sizes(dtype, dim, is_large)
    assert (tiles["BLOCK_ROWS"], tiles["BLOCK_COLUMNS"]) == (
        (64, 64) if total == 100 else (128, 64 if dim == 192 else 128)
    )
    monkeypatch.setattr(embed, "fills_a_gpu", lambda *_: is_large)
    images = torch.randn(9, 3, 10, 14, device=triton.device).to(dtype)
    check_embed(images, (5, 7), (2, 2), [35, 0, 35, 20, *[1] * 4, 35], dim=dim)


def test_dropped_pixels_bear_on_nothing(backend):
    arguments, wanted = check_embed(torch.randn(6, 3, 10, 14, device=backend.device), (5, 7), (2, 2), MIXED)
    images, *others, indices, cu_seqlens, total = arguments
    dropped = torch.ones(6, 36, dtype=torch.bool, device=backend.device)
    dropped.scatter_(1, torch.where(indices >= 0, indices, 35).long(), False)
    dropped = dropped[:, :35].view(6, 1, 5, 7).repeat_interleave(2, 2).repeat_interleave(2, 3)
    poisoned = images.masked_fill(dropped, float("nan"))
    assert torch.equal(ops.embed_tokens(poisoned, *others, indices, cu_seqlens, total), wanted)


@pytest.mark.parametrize("counts", [MIXED, [0, 0], [35]], ids=str)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens(backend, counts, prefix, dtype):
    tokens = torch.randn(len(counts), 35, 13, device=backend.device).to(dtype)
    rows = torch.randn(len(counts), prefix, 13, device=backend.device).to(dtype)
    indices, cu_seqlens, total = ragged(counts, 35, prefix, backend.device)
    out = ops.gather_tokens(tokens, rows, indices, cu_seqlens, total)
    assert out.dtype == dtype and out.is_contiguous()
    assert torch.equal(out.cpu(), packed_by_hand(tokens.cpu(), rows.cpu(), indices))  # copied, therefore exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens_with_strides(backend, dtype):
    """Check tokens that are a view of a feature map, and prefix rows that are sliced or expanded from one image."""
    tokens = torch.randn(6, 300, 35, device=backend.device).to(dtype).transpose(1, 2)
    rows = torch.randn(6, 40, 300, device=backend.device).to(dtype)
    indices, cu_seqlens, total = ragged(MIXED, 35, 2, backend.device)
    for prefix in (rows[:, :2], rows[:1, :2].expand(6, -1, -1)):
        out = ops.gather_tokens(tokens, prefix, indices, cu_seqlens, total)
        assert torch.equal(out.cpu(), packed_by_hand(tokens.cpu(), prefix.cpu(), indices))


def test_gradients(backend):
    """Check the gradients of all floating arguments under every forced backend."""
    indices, cu_seqlens, total = ragged([3, 0, 6], 6, 1, backend.device)
    shapes = {"images": (3, 2, 4, 6), "weight": (5, 2, 2, 2), "bias": (5,), "prefix": (1, 5), "pos_embed": (6, 5)}
    given = [torch.randn(*s, dtype=torch.float64, device=backend.device, requires_grad=True) for s in shapes.values()]
    assert torch.autograd.gradcheck(lambda *t: ops.embed_tokens(*t, indices, cu_seqlens, total), given)
    tokens = torch.randn(3, 6, 5, dtype=torch.float64, device=backend.device, requires_grad=True)
    prefix = torch.randn(3, 1, 5, dtype=torch.float64, device=backend.device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: ops.gather_tokens(*t, indices, cu_seqlens, total), (tokens, prefix))
    with torch.no_grad():
        assert not ops.gather_tokens(tokens, prefix, indices, cu_seqlens, total).requires_grad
