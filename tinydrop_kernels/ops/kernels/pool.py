"""The kernel of ``segment_pool``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinydrop_kernels.ops.kernels.launcher import FUSED


@triton.jit(do_not_specialize=["skip"])
def segment_pool_kernel(
    tokens_pointer,
    cu_seqlens_pointer,
    out_pointer,
    skip,
    token_row_stride,
    token_column_stride,
    dim: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Reduce each segment to its first row, its mean or its maximum.

    Args:
        tokens_pointer: of shape [total, dim].
        cu_seqlens_pointer: first row of each segment, of shape [segments + 1].
        out_pointer: output, of shape [segments, dim].
        skip: number of rows at the start of each segment to leave out.
        token_row_stride, token_column_stride: strides of the tokens, in elements.
        dim: columns of the tokens.
        MODE: "first", "mean" or "max".
        BLOCK_ROWS, BLOCK_COLUMNS: size of a tile of tokens.
    """
    # This program processes BLOCK_COLUMNS columns of one segment.
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_width = column < dim
    first = tl.load(cu_seqlens_pointer + segment) + skip
    end = tl.load(cu_seqlens_pointer + segment + 1)
    column_pointers = tokens_pointer + column.to(tl.int64) * token_column_stride

    pooled = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if first < end:
        if MODE == "first":
            pooled = tl.load(column_pointers + first.to(tl.int64) * token_row_stride, mask=in_width).to(tl.float32)
        else:
            start = -float("inf") if MODE == "max" else 0.0
            reduced = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), start, tl.float32)
            row = first
            while row < end:
                rows = row + tl.arange(0, BLOCK_ROWS)
                pointers = column_pointers[None, :] + rows[:, None].to(tl.int64) * token_row_stride
                mask = (rows < end)[:, None] & in_width[None, :]
                tile = tl.load(pointers, mask=mask, other=start).to(tl.float32)
                if MODE == "max":  # propagate NaN as torch.amax does; a plain maximum drops it
                    reduced = tl.where((tile > reduced) | (tile != tile), tile, reduced)
                else:
                    reduced += tile
                row += BLOCK_ROWS
            if MODE == "max":
                has_nan = tl.max((reduced != reduced).to(tl.int32), axis=0) > 0
                pooled = tl.where(has_nan, float("nan"), tl.max(reduced, axis=0))
            else:
                pooled = tl.sum(reduced, axis=0) / (end - first).to(tl.float32)
    tl.store(out_pointer + segment * dim + column, pooled.to(out_pointer.dtype.element_ty), mask=in_width)


def launch(tokens: Tensor, cu_seqlens: Tensor, mode: str, skip: int) -> Tensor:
    """Run :func:`ops.segment_pool`."""
    segments, dim = cu_seqlens.shape[0] - 1, tokens.shape[1]
    out = tokens.new_empty(segments, dim)
    if segments == 0:
        return out
    with torch.cuda.device_of(tokens):
        # Launch a 2D grid in which each program reduces 64 columns of one segment. This gives enough programs for a GPU
        # from about a dozen images on, and reads rows of at least 128 bytes.
        segment_pool_kernel[(segments, triton.cdiv(dim, 64))](
            tokens,
            cu_seqlens.contiguous(),
            out,
            skip,
            *tokens.stride(),
            dim=dim,
            MODE=mode,
            BLOCK_ROWS=32,
            BLOCK_COLUMNS=64,
            num_warps=4,
            **FUSED,
        )
    return out
