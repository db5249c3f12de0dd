"""Packed tokens from embedded ones."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.segments import locate_rows, mean_of_dropped, search_step


@triton.jit
def write_summary_row(
    tile,
    tokens_pointer,
    pos_embed_pointer,
    indices_pointer,
    cu_seqlens_pointer,
    out_pointer,
    token_image_stride,
    token_patch_stride,
    token_column_stride,
    dim: tl.constexpr,
    num_patches: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Average BLOCK_COLUMNS columns of one image's dropped tokens; pointers as in :func:`gather_tokens_kernel`."""
    column_tiles: tl.constexpr = (dim + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    image = (tile // column_tiles).to(tl.int64)
    column = tile % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < dim
    kept_pointer = indices_pointer + image * num_patches
    start = tl.load(cu_seqlens_pointer + image)
    end = tl.load(cu_seqlens_pointer + image + 1)
    if (end > start) & (tl.load(kept_pointer + num_patches - 1) < 0):
        token_pointers = tokens_pointer + image * token_image_stride + column.to(tl.int64) * token_column_stride
        mean = mean_of_dropped(
            *(token_pointers, in_width, kept_pointer, num_patches),
            *(1, token_patch_stride, 0, BLOCK_PATCHES, BLOCK_COLUMNS),
        )
        if pos_embed_pointer is not None:
            mean += mean_of_dropped(
                *(pos_embed_pointer + column, in_width, kept_pointer, num_patches),
                *(1, dim, 0, BLOCK_PATCHES, BLOCK_COLUMNS),
            )
        out_pointers = out_pointer + (end - 1).to(tl.int64) * dim + column
        tl.store(out_pointers, mean.to(out_pointer.dtype.element_ty), mask=in_width)


@triton.jit(do_not_specialize=["total", "batch", "first_step", "summary_programs"])
def gather_tokens_kernel(
    tokens_pointer,
    prefix_pointer,
    pos_embed_pointer,
    indices_pointer,
    cu_seqlens_pointer,
    out_pointer,
    total,
    batch,
    first_step,
    summary_programs,
    token_image_stride,
    token_patch_stride,
    token_column_stride,
    prefix_image_stride,
    prefix_row_stride,
    prefix_column_stride,
    dim: tl.constexpr,
    num_patches: tl.constexpr,
    num_prefix_tokens: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr,
    BLOCK_MEAN: tl.constexpr,
):
    """Copy kept tokens and prefix rows to their packed rows, add positions, and average what was dropped.

    Args:
        tokens_pointer: of shape [batch, num_patches, dim].
        prefix_pointer: of shape [batch or 1, num_prefix_tokens, dim].
        pos_embed_pointer: of shape [num_patches, dim], or None.
        indices_pointer: of shape [batch, num_patches].
        cu_seqlens_pointer: of shape [batch + 1].
        out_pointer: output, of shape [total, dim].
    """
    # This program processes BLOCK_MEAN columns of one image's summary row; or, behind the first summary_programs,
    # BLOCK_ROWS packed rows and BLOCK_COLUMNS columns, of which it leaves the summary rows alone.
    program = tl.program_id(0)
    if program < summary_programs:
        write_summary_row(
            *(program, tokens_pointer, pos_embed_pointer, indices_pointer, cu_seqlens_pointer, out_pointer),
            *(token_image_stride, token_patch_stride, token_column_stride),
            *(dim, num_patches, BLOCK_PATCHES, BLOCK_MEAN),
        )
        return

    column_tiles: tl.constexpr = (dim + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = program - summary_programs
    row = tile // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tile % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < dim
    live = row < total
    image, place, patch = locate_rows(
        row, live, indices_pointer, cu_seqlens_pointer, batch, first_step, num_patches, num_prefix_tokens
    )
    is_written = patch >= 0
    kept_mask = is_written[:, None] & in_width[None, :]
    token_rows = image * token_image_stride + patch.to(tl.int64) * token_patch_stride
    token_columns = column.to(tl.int64) * token_column_stride
    token_pointers = tokens_pointer + token_rows[:, None] + token_columns[None, :]
    value = tl.load(token_pointers, mask=kept_mask, other=0.0).to(tl.float32)
    if pos_embed_pointer is not None:
        position_pointers = pos_embed_pointer + patch[:, None] * dim + column[None, :]
        value += tl.load(position_pointers, mask=kept_mask, other=0.0).to(tl.float32)
    if num_prefix_tokens > 0:
        in_prefix = live & (place < 0)
        prefix_rows = image * prefix_image_stride + (place + num_prefix_tokens) * prefix_row_stride
        prefix_pointers = prefix_pointer + prefix_rows[:, None] + (column * prefix_column_stride)[None, :]
        prefix = tl.load(prefix_pointers, mask=in_prefix[:, None] & in_width[None, :], other=0.0)
        value = tl.where(in_prefix[:, None], prefix.to(tl.float32), value)
        is_written = is_written | in_prefix
    out_pointers = out_pointer + row[:, None].to(tl.int64) * dim + column[None, :]
    tl.store(out_pointers, value.to(out_pointer.dtype.element_ty), mask=is_written[:, None] & in_width[None, :])


def launch(
    tokens: Tensor,
    prefix: Tensor,
    pos_embed: Tensor | None,
    indices: Tensor,
    cu_seqlens: Tensor,
    total: int,
    summary: bool,
) -> Tensor:
    """See :func:`ops.gather_tokens`."""
    batch, num_patches, dim = tokens.shape
    out = tokens.new_empty(total, dim)
    if total == 0:
        return out
    # 4096 elements a program, 32 a thread: rows of 512 bytes or more where the dim has them.
    block_columns = min(256, triton.next_power_of_2(dim))
    block_rows = 4096 // block_columns
    summary_programs = batch * triton.cdiv(dim, 64) if summary else 0
    copy_programs = triton.cdiv(total, block_rows) * triton.cdiv(dim, block_columns)
    with torch.cuda.device_of(tokens):
        # Launches a 1D grid: 64 columns of each summary row first, because they take longest; then the packed rows.
        gather_tokens_kernel[(summary_programs + copy_programs,)](
            tokens,
            prefix,
            None if pos_embed is None else pos_embed.contiguous(),
            indices.contiguous(),
            cu_seqlens.contiguous(),
            out,
            total,
            batch,
            search_step(batch),
            summary_programs,
            *tokens.stride(),
            prefix.stride(0) if prefix.ndim == 3 else 0,
            *prefix.stride()[-2:],
            dim=dim,
            num_patches=num_patches,
            num_prefix_tokens=prefix.shape[-2],
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            BLOCK_PATCHES=32,  # 64 doubles the registers, also those of the programs that only copy
            BLOCK_MEAN=64,
            num_warps=4,
        )
    return out
