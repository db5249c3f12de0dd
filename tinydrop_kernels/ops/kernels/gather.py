"""The kernel of ``gather_tokens``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import FUSED
from tinydrop_kernels.ops.kernels.segments import locate_rows, search_step


@triton.jit(do_not_specialize=["total", "segments", "first_step", "indices_stride"])
def gather_tokens_kernel(
    tokens_pointer,
    prefix_pointer,
    indices_pointer,
    cu_seqlens_pointer,
    out_pointer,
    total,
    segments,
    first_step,
    indices_stride,
    token_segment_stride,
    token_patch_stride,
    token_column_stride,
    prefix_segment_stride,
    prefix_row_stride,
    prefix_column_stride,
    dim: tl.constexpr,
    num_prefix_tokens: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy kept tokens and prefix rows to their packed rows.

    Args:
        tokens_pointer: of shape [segments, patches, dim].
        prefix_pointer: of shape [segments, num_prefix_tokens, dim].
        indices_pointer, cu_seqlens_pointer, segments, first_step, indices_stride: as in :func:`locate_rows`.
        out_pointer: output, of shape [total, dim].
        total: packed rows.
        token_segment_stride to prefix_column_stride: strides of the tokens and of the prefix, in elements.
        dim, num_prefix_tokens: sizes of the above.
        BLOCK_ROWS, BLOCK_COLUMNS: size of a tile of packed rows.
    """
    # This program processes BLOCK_ROWS packed rows and BLOCK_COLUMNS columns.
    column_tiles: tl.constexpr = (dim + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(0)
    row = tile // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tile % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    in_width = column < dim
    live = row < total
    segment, place, patch = locate_rows(
        row, live, indices_pointer, cu_seqlens_pointer, segments, first_step, indices_stride, num_prefix_tokens
    )
    is_kept = patch >= 0
    token_rows = segment * token_segment_stride + patch.to(tl.int64) * token_patch_stride
    token_pointers = tokens_pointer + token_rows[:, None] + (column * token_column_stride)[None, :]
    value = tl.load(token_pointers, mask=is_kept[:, None] & in_width[None, :], other=0.0)
    if num_prefix_tokens > 0:
        in_prefix = live & (place < 0)
        prefix_rows = segment * prefix_segment_stride + (place + num_prefix_tokens) * prefix_row_stride
        prefix_pointers = prefix_pointer + prefix_rows[:, None] + (column * prefix_column_stride)[None, :]
        prefix = tl.load(prefix_pointers, mask=in_prefix[:, None] & in_width[None, :], other=0.0)
        value = tl.where(in_prefix[:, None], prefix.to(value.dtype), value)
    out_pointers = out_pointer + row[:, None].to(tl.int64) * dim + column[None, :]
    tl.store(out_pointers, value, mask=live[:, None] & in_width[None, :])


def launch(tokens: Tensor, prefix: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Run :func:`ops.gather_tokens`."""
    segments, _, dim = tokens.shape
    out = tokens.new_empty(total, dim)
    if total == 0:
        return out
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    # A program copies 4096 elements, 32 per thread. Its rows are at least 512 bytes if the dim allows.
    block_columns = min(256, triton.next_power_of_2(dim))
    block_rows = 4096 // block_columns
    with torch.cuda.device_of(tokens):
        # Launch a 1D grid over the tiles of the packed rows.
        gather_tokens_kernel[(triton.cdiv(total, block_rows) * triton.cdiv(dim, block_columns),)](
            tokens,
            prefix,
            indices,
            cu_seqlens.contiguous(),
            out,
            total,
            segments,
            search_step(segments),
            indices.stride(0),
            *tokens.stride(),
            *prefix.stride(),
            dim=dim,
            num_prefix_tokens=prefix.shape[1],
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
            **FUSED,
        )
    return out
