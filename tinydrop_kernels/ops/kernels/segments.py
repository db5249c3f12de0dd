"""What the kernels over packed tokens share: which patch a packed row holds, and means over the dropped patches."""

import triton
import triton.language as tl


def search_step(batch: int) -> int:
    """The first step of the binary search in :func:`locate_rows`: the largest power of two below ``batch``, or 0."""
    return 1 << (batch - 1).bit_length() >> 1


@triton.jit
def locate_rows(
    rows,
    live,
    indices_pointer,
    cu_seqlens_pointer,
    batch,
    first_step,
    num_patches: tl.constexpr,
    num_prefix_tokens: tl.constexpr,
):
    """Find the image, the place and the patch of packed rows.

    Args:
        rows: packed rows, of shape [BLOCK_ROWS].
        live: whether each is a row at all, of shape [BLOCK_ROWS].
        indices_pointer: kept patches of each image in raster order, then -1, of shape [batch, num_patches].
        cu_seqlens_pointer: first row of each image, of shape [batch + 1].
        first_step: :func:`search_step` of the batch.

    Returns:
        image: int64, so that offsets into a large batch do not overflow, of shape [BLOCK_ROWS].
        place: row within the image's segment less the prefix tokens, negative in the prefix, of shape [BLOCK_ROWS].
        patch: the patch there, or -1 in the prefix, in the summary and where not live, of shape [BLOCK_ROWS].
    """
    # The last image that begins at or before the row. Images that exited begin where the next one does, so the last is
    # never one of them. Every row searches alike, which makes the first steps broadcast loads that hit the L1 cache.
    image = tl.zeros_like(rows)
    step = first_step
    while step > 0:
        probe = image + step
        start = tl.load(cu_seqlens_pointer + probe, mask=probe < batch, other=2147483647)
        image = tl.where(start <= rows, probe, image)
        step = step // 2

    place = rows - tl.load(cu_seqlens_pointer + image) - num_prefix_tokens
    image = image.to(tl.int64)
    patch = tl.load(indices_pointer + image * num_patches + place, mask=live & (place >= 0), other=-1)
    return image, place, patch


@triton.jit
def mean_of_dropped(
    column_pointers,
    column_mask,
    kept_pointer,
    num_patches: tl.constexpr,
    grid_columns: tl.constexpr,
    grid_row_stride,
    grid_column_stride,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The mean over an image's dropped patches, float32 of shape [BLOCK_COLUMNS], in one pass that reads no others.

    Args:
        column_pointers: values of patch 0, of shape [BLOCK_COLUMNS].
        column_mask: which of them exist, of shape [BLOCK_COLUMNS].
        kept_pointer: kept patches of this image in raster order, then -1, of shape [num_patches].
        grid_columns, grid_row_stride, grid_column_stride: patch ``t`` lies ``(t // grid_columns) * grid_row_stride +
            (t % grid_columns) * grid_column_stride`` elements behind patch 0.
    """
    total = tl.zeros((BLOCK_PATCHES, BLOCK_COLUMNS), tl.float32)
    places = tl.arange(0, BLOCK_PATCHES)
    seen = 0  # kept patches before this tile
    for first in range(0, num_patches, BLOCK_PATCHES):
        patch = first + places
        # Kept patches are in raster order, so those of this tile are among the next BLOCK_PATCHES unseen ones.
        kept = tl.load(kept_pointer + seen + places, mask=seen + places < num_patches, other=-1)
        is_kept = tl.max((patch[:, None] == kept[None, :]).to(tl.int32), axis=1)
        seen += tl.sum(is_kept)
        grid_row = (patch // grid_columns).to(tl.int64)
        offsets = grid_row * grid_row_stride + (patch % grid_columns) * grid_column_stride
        dropped = (is_kept == 0) & (patch < num_patches)
        mask = dropped[:, None] & column_mask[None, :]
        total += tl.load(column_pointers[None, :] + offsets[:, None], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, axis=0) / tl.maximum(num_patches - seen, 1).to(tl.float32)


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
    """Where pixel ``k`` of a patch lies behind its first: [channel, row, column], or [row, column, channel]."""
    if CHANNELS_LAST:  # a row of a patch is one run of pixels and channels
        line: tl.constexpr = PATCH_WIDTH * CHANNELS
        return (k // line).to(tl.int64) * row_stride + k % line
    channel = (k // (PATCH_HEIGHT * PATCH_WIDTH)).to(tl.int64)
    row = (k // PATCH_WIDTH) % PATCH_HEIGHT
    return channel * channel_stride + row * row_stride + (k % PATCH_WIDTH) * column_stride


@triton.jit
def mean_patch_kernel(
    images_pointer,
    bias_pointer,
    pos_embed_pointer,
    indices_pointer,
    cu_seqlens_pointer,
    mean_pixels_pointer,
    summary_pointer,
    dim: tl.constexpr,
    num_patches: tl.constexpr,
    grid_columns: tl.constexpr,
    image_stride: tl.constexpr,
    channel_stride: tl.constexpr,
    row_stride: tl.constexpr,
    column_stride: tl.constexpr,
    CHANNELS: tl.constexpr,
    PATCH_HEIGHT: tl.constexpr,
    PATCH_WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Average the dropped patches of each image, and their positions, to which the bias is added.

    Args:
        images_pointer: of shape [batch, channels, height, width].
        bias_pointer: of shape [dim], or None.
        pos_embed_pointer: of shape [num_patches, dim], or None.
        indices_pointer: of shape [batch, num_patches].
        cu_seqlens_pointer: of shape [batch + 1].
        mean_pixels_pointer: output, pixels ordered as in :func:`pixel_offsets`, of shape [batch, pixels of a patch].
        summary_pointer: output, the summary rows but for the projection of their pixels, of shape [batch, dim].
    """
    # This program processes BLOCK_COLUMNS pixels of a patch, or as many columns of the positions, of one image.
    num_pixels: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    pixel_tiles: tl.constexpr = (num_pixels + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    image = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if tl.load(cu_seqlens_pointer + image + 1) == tl.load(cu_seqlens_pointer + image):
        return  # the image exited: nobody reads its mean
    kept_pointer = indices_pointer + image * num_patches
    if tile < pixel_tiles:
        k = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        offsets = pixel_offsets(
            k, channel_stride, row_stride, column_stride, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
        )
        mean = mean_of_dropped(
            images_pointer + image * image_stride + offsets,
            k < num_pixels,
            kept_pointer,
            num_patches,
            grid_columns,
            PATCH_HEIGHT * row_stride,
            PATCH_WIDTH * column_stride,
            BLOCK_PATCHES,
            BLOCK_COLUMNS,
        )
        out_pointers = mean_pixels_pointer + image * num_pixels + k
        tl.store(out_pointers, mean.to(mean_pixels_pointer.dtype.element_ty), mask=k < num_pixels)
    else:
        column = (tile - pixel_tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        summary = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        if pos_embed_pointer is not None:
            summary += mean_of_dropped(
                *(pos_embed_pointer + column, column < dim, kept_pointer, num_patches),
                *(1, dim, 0, BLOCK_PATCHES, BLOCK_COLUMNS),
            )
        if bias_pointer is not None:
            summary += tl.load(bias_pointer + column, mask=column < dim, other=0.0).to(tl.float32)
        out_pointers = summary_pointer + image * dim + column
        tl.store(out_pointers, summary.to(summary_pointer.dtype.element_ty), mask=column < dim)
