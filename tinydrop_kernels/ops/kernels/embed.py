"""The kernel of ``embed_tokens``: a matrix product whose left operand is gathered from the images."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import Launcher, LaunchPlan, aligned
from tinydrop_kernels.ops.kernels.segments import locate_rows, search_step


@triton.jit
def pixel_offsets(
    k,
    channel_stride: tl.constexpr,
    row_stride: tl.constexpr,
    column_stride: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """Return the offset of pixel ``k`` of a patch from the patch's first pixel.

    Pixels are numbered in the order [channel, row, column], or [row, column, channel] if CHANNELS_LAST.
    """
    if CHANNELS_LAST:  # a row of a patch is one run of pixels and channels
        line: tl.constexpr = PATCH_WIDTH * CHANNELS
        return (k // line).to(tl.int64) * row_stride + k % line
    channel = (k // (PATCH_HEIGHT * PATCH_WIDTH)).to(tl.int64)
    row = (k // PATCH_WIDTH) % PATCH_HEIGHT
    return channel * channel_stride + row * row_stride + (k % PATCH_WIDTH) * column_stride


# Do not specialise on what changes from batch to batch; otherwise the kernel would recompile. The images' geometry is
# constant, because its strides tell the compiler how wide it may load (518 pixels in a row are no multiple of 16).
@triton.jit(
    do_not_specialize=["total", "segments", "first_step", "indices_stride"],
    do_not_specialize_on_alignment=["indices_pointer", "cu_seqlens_pointer"],
)
def embed_tokens_kernel(
    images_pointer,
    weight_pointer,
    bias_pointer,
    prefix_pointer,
    pos_embed_pointer,
    indices_pointer,
    cu_seqlens_pointer,
    out_pointer,
    total,
    segments,
    first_step,
    indices_stride,
    num_prefix_tokens: tl.constexpr,
    dim: tl.constexpr,
    grid_columns: tl.constexpr,
    image_stride: tl.constexpr,
    channel_stride: tl.constexpr,
    row_stride: tl.constexpr,
    column_stride: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Project the pixels of kept patches, add their positions, and put prefix rows between them.

    Args:
        images_pointer: of shape [segments, channels, height, width].
        weight_pointer: pixels ordered as in :func:`pixel_offsets`, of shape [dim, pixels of a patch].
        bias_pointer: of shape [dim], or None.
        prefix_pointer: of shape [num_prefix_tokens, dim].
        pos_embed_pointer: of shape [patches, dim], or None.
        indices_pointer, cu_seqlens_pointer, segments, first_step, indices_stride: as in :func:`locate_rows`.
        out_pointer: output, of shape [total, dim].
        total: packed rows.
        num_prefix_tokens, dim: sizes of the above.
        grid_columns: patches in a row of an image.
        image_stride, channel_stride, row_stride, column_stride: strides of the images, in elements.
        CHANNELS, PATCH_HEIGHT, PATCH_WIDTH: size of a patch.
        CHANNELS_LAST: whether the channels of a pixel are neighbours.
        INPUT_PRECISION: precision of float32 products, "tf32" or "ieee".
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_PIXELS: the tile of the product.
    """
    # This program processes BLOCK_ROWS packed rows and BLOCK_COLUMNS columns. Neighbouring programs share the rows, so
    # that pixels are read from memory once and then from the L2 cache. The weight stays in that cache anyway.
    num_pixels: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    column_tiles: tl.constexpr = (dim + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = tl.program_id(0) // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = row < total
    in_width = column < dim
    image, place, patch = locate_rows(
        row, live, indices_pointer, cu_seqlens_pointer, segments, first_step, indices_stride, num_prefix_tokens
    )

    is_kept = patch >= 0
    patch_row = (patch // grid_columns).to(tl.int64) * (PATCH_HEIGHT * row_stride)
    patch_column = (patch % grid_columns) * (PATCH_WIDTH * column_stride)
    patch_pointers = images_pointer + image * image_stride + patch_row + patch_column

    projected = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, num_pixels, BLOCK_PIXELS):
        k = first + tl.arange(0, BLOCK_PIXELS)
        offsets = pixel_offsets(
            k, channel_stride, row_stride, column_stride, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
        )
        pixel_mask = is_kept[:, None]
        weight_mask = in_width[None, :]
        if num_pixels % BLOCK_PIXELS != 0:
            pixel_mask = pixel_mask & (k < num_pixels)[None, :]
            weight_mask = weight_mask & (k < num_pixels)[:, None]
        pixels = tl.load(patch_pointers[:, None] + offsets[None, :], mask=pixel_mask, other=0.0)
        weight = tl.load(weight_pointer + column[None, :] * num_pixels + k[:, None], mask=weight_mask, other=0.0)
        projected = tl.dot(pixels, weight, projected, input_precision=INPUT_PRECISION)

    if bias_pointer is not None:
        projected += tl.load(bias_pointer + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    if pos_embed_pointer is not None:
        position_pointers = pos_embed_pointer + patch[:, None] * dim + column[None, :]
        position = tl.load(position_pointers, mask=is_kept[:, None] & in_width[None, :], other=0.0)
        projected += position.to(tl.float32)
    if num_prefix_tokens > 0:
        in_prefix = live & (place < 0)
        prefix_pointers = prefix_pointer + (place + num_prefix_tokens)[:, None] * dim + column[None, :]
        prefix = tl.load(prefix_pointers, mask=in_prefix[:, None] & in_width[None, :], other=0.0)
        projected = tl.where(in_prefix[:, None], prefix.to(tl.float32), projected)
    out_pointers = out_pointer + row[:, None].to(tl.int64) * dim + column[None, :]
    tl.store(out_pointers, projected.to(out_pointer.dtype.element_ty), mask=live[:, None] & in_width[None, :])


def fills_a_gpu(total: int, dim: int) -> bool:
    """Return whether the result has a tile of 128 x 128 for each of 132 multiprocessors (those of an H100)."""
    return -(-total // 128) * -(-dim // 128) >= 132


def tile_sizes(dtype: torch.dtype, dim: int, is_large: bool) -> dict[str, int]:
    """Return tiles, warps and stages for :func:`embed_tokens_kernel`.

    Tiles of 128 x 128 need half the memory traffic of 64 x 64. Three stages of them take 96 KiB, which fits GPUs with
    99 KiB for a program too. Tiles are smaller if the batch does not fill a GPU with large ones, or if they do not
    divide the width. float32 takes smaller tiles in smaller steps, because no tensor cores have its precision.
    """
    if dtype.itemsize > 2:
        # With maxnreg=128 nothing spills (Triton 3.6 and 3.9), and two programs fit on a multiprocessor. Otherwise the
        # assembler takes 80 registers to fit three programs, and spills.
        tiles = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_PIXELS": 16}
        return tiles | {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
    if not is_large:
        return {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_PIXELS": 64, "num_warps": 4, "num_stages": 4}
    columns = 128 if dim % 128 == 0 else 64
    return {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": columns, "BLOCK_PIXELS": 64, "num_warps": 8, "num_stages": 3}


@functools.lru_cache(maxsize=64)
def plan_launch(
    device: torch.device,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype | bool, ...],
    image_shape: tuple[int, ...],
    image_stride: tuple[int, ...],
    weight_shape: tuple[int, ...],
    num_prefix_tokens: int,
    is_large: bool,
    precision: str,
) -> LaunchPlan:
    """Return the launch plan for images of one geometry.

    Args:
        dtype: dtype of the images.
        dtypes: dtypes of weight, bias, prefix, pos_embed, indices and cu_seqlens; True in place of a missing tensor.
        is_large: the result of :func:`fills_a_gpu` for the batch.
    """
    dim, channels, patch_height, patch_width = weight_shape
    tiles = tile_sizes(dtype, dim, is_large)
    blocks = (tiles["BLOCK_ROWS"], tiles["BLOCK_COLUMNS"], tiles["BLOCK_PIXELS"])
    is_last = channels_last(image_shape, image_stride)
    sizes = (num_prefix_tokens, dim, image_shape[3] // patch_width)
    constants = (*sizes, *image_stride, channels, patch_height, patch_width, is_last, precision, *blocks)
    options = {name: value for name, value in tiles.items() if not name.startswith("BLOCK_")}
    launcher = Launcher(embed_tokens_kernel, device, (dtype, dtypes, constants), options)
    return LaunchPlan(launcher, constants, tile=blocks[:2])


def channels_last(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the channels of a pixel are neighbours, and so are the pixels of a row."""
    return shape[1] > 1 and stride[1] == 1 and stride[3] == shape[1]


def launch(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
) -> Tensor:
    """Run :func:`ops.embed_tokens`."""
    dim = weight.shape[0]
    out = images.new_empty(total, dim)
    if total == 0:
        return out
    plan = plan_launch(
        images.device,
        images.dtype,
        (
            weight.dtype,
            bias is None or bias.dtype,
            prefix.dtype,
            pos_embed is None or pos_embed.dtype,
            indices.dtype,
            cu_seqlens.dtype,
        ),
        images.shape,
        images.stride(),
        weight.shape,
        prefix.shape[0],
        fills_a_gpu(total, dim),
        "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    )
    # Put the weight in the images' memory order, because the product reads a patch's pixels in that order.
    order = torch.channels_last if channels_last(images.shape, images.stride()) else torch.contiguous_format
    weight = weight.contiguous(memory_format=order)
    bias = None if bias is None else bias.contiguous()
    pos_embed = None if pos_embed is None else pos_embed.contiguous()
    prefix, cu_seqlens = prefix.contiguous(), cu_seqlens.contiguous()
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    segments = indices.shape[0]
    # Launch a 1D grid over the tiles of the packed rows and their columns. A tile may span several images.
    rows, columns = plan.tile
    programs = -(-total // rows) * -(-dim // columns)
    tensors = (images, weight, bias, prefix, pos_embed, indices, cu_seqlens, out)
    stride = indices.stride(0) if segments > 1 else 0  # torch may give a single row any stride
    numbers = (total, segments, search_step(segments), stride)
    are_aligned = aligned(images, weight, bias, prefix, pos_embed)
    plan.launcher((programs, 1, 1), (*tensors, *numbers, *plan.numbers), are_aligned)
    return out
