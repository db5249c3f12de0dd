"""Attention within short segments: FlashAttention's arithmetic (arXiv 2205.14135) on tiles that fit 1 to 260 tokens."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
# Below every score, but finite: where there are no keys, or a bias hides them all, every weight is 0.
LOWEST = tl.constexpr(-3e38)


@triton.jit
def load_tile(pointer, rows, end, row_stride, head_dim: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of one head, of shape [BLOCK_ROWS, BLOCK_DIM]; zeros from row ``end`` and column ``head_dim`` on."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = pointer + rows.to(tl.int64)[:, None] * row_stride + column[None, :]
    return tl.load(pointers, mask=(rows < end)[:, None] & (column < head_dim)[None, :], other=0.0)


@triton.jit
def table_code(position, grid_columns):
    """A patch's share of its index into the relative position table: codes subtract as coordinates do."""
    return position + position // grid_columns * (grid_columns - 1)


@triton.jit
def scores_of(
    query,
    key,
    key_rows,
    key_end,
    query_position,
    bias_pointer,
    positions_pointer,
    distance_stride,
    score_scale,
    grid_rows,
    grid_columns,
):
    """Biased scores in units of log 2, so that the softmax is one of powers of two; -inf at rows that are no key.

    Args:
        query: of shape [BLOCK_QUERY, BLOCK_DIM].
        key: of shape [BLOCK_KEY, BLOCK_DIM].
        key_rows: packed row of each key, of shape [BLOCK_KEY].
        query_position: patch of each query, negative at the class token, of shape [BLOCK_QUERY].
        bias_pointer: the head's column of the table, or None.
        positions_pointer: patch of each packed row, of shape [total].

    Returns:
        float32, of shape [BLOCK_QUERY, BLOCK_KEY].
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
    is_key = (key_rows < key_end)[None, :]
    if bias_pointer is not None:
        key_position = tl.load(positions_pointer + key_rows, mask=key_rows < key_end, other=0)
        distances = (2 * grid_rows - 1) * (2 * grid_columns - 1)
        from_code = table_code(query_position, grid_columns) + distances // 2
        distance = from_code[:, None] - table_code(key_position, grid_columns)[None, :]
        from_class, to_class = (query_position < 0)[:, None], (key_position < 0)[None, :]
        distance = tl.where(from_class, distances, distance)
        distance = tl.where(to_class, tl.where(from_class, distances + 2, distances + 1), distance)
        bias = tl.load(bias_pointer + distance * distance_stride, mask=is_key, other=0.0)
        scores += bias.to(tl.float32) * LOG2_E
    return tl.where(is_key, scores, -float("inf"))


@triton.jit(do_not_specialize=["query_blocks", "skip_keys"])
def varlen_attention_kernel(
    query_pointer,
    key_pointer,
    value_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    bias_pointer,
    positions_pointer,
    out_pointer,
    score_scale,
    heads,
    query_blocks,
    query_row_units,
    query_head_units,
    key_row_units,
    key_head_units,
    value_row_units,
    value_head_units,
    distance_stride,
    bias_head_stride,
    grid_rows,
    grid_columns,
    skip_keys,
    head_dim: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Attend one head of one block of a segment's queries to all of its keys.

    Args:
        query_pointer: of shape [total_q, heads, head_dim].
        key_pointer, value_pointer: of shape [total_k, heads, head_dim].
        cu_seqlens_q_pointer, cu_seqlens_k_pointer: of shape [segments + 1].
        bias_pointer: relative position table, of shape [distances, heads], or None.
        positions_pointer: patch of each packed row, of shape [total], or None.
        out_pointer: output, of shape [total_q, heads, head_dim], contiguous.
        score_scale: factor on the products, times log2(e).
        heads: number of heads.
        query_blocks: blocks of BLOCK_QUERY rows in the longest segment.
        query_row_units to value_head_units: strides of query, key and value, in units of STRIDE_UNIT elements.
        distance_stride, bias_head_stride: of the table, in elements.
        grid_rows, grid_columns: the patch grid that the table is of.
        skip_keys: keys at the head of each segment that take no part.
        head_dim: elements of a head.
        STRIDE_UNIT: elements in which the row and head strides are counted. Triton learns of a stride at most that 16
            divides it; heads of 72 and 88 would be loaded two bytes at a time.
        BLOCK_QUERY, BLOCK_KEY: a tile of scores.
        BLOCK_DIM: at least head_dim.
        RESIDENT: whether BLOCK_KEY holds the longest segment: one tile of scores then, and no running softmax.
    """
    # This program processes BLOCK_QUERY queries of one head of one segment. Heads come first, because they lie beside
    # one another in memory; then the segment's other queries, which find its keys in the L2 cache.
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    segment = program // heads // query_blocks
    query_end = tl.load(cu_seqlens_q_pointer + segment + 1)
    query_start = tl.load(cu_seqlens_q_pointer + segment) + program // heads % query_blocks * BLOCK_QUERY
    if query_start >= query_end:
        return
    key_start = tl.load(cu_seqlens_k_pointer + segment) + skip_keys
    key_end = tl.load(cu_seqlens_k_pointer + segment + 1)

    query_row_stride, key_row_stride = query_row_units * STRIDE_UNIT, key_row_units * STRIDE_UNIT
    value_row_stride = value_row_units * STRIDE_UNIT
    query_rows = query_start + tl.arange(0, BLOCK_QUERY)
    query_pointer += head * query_head_units * STRIDE_UNIT
    key_pointer += head * key_head_units * STRIDE_UNIT
    value_pointer += head * value_head_units * STRIDE_UNIT
    query = load_tile(query_pointer, query_rows, query_end, query_row_stride, head_dim, BLOCK_DIM)
    query_position = query_rows
    if bias_pointer is not None:
        bias_pointer += head * bias_head_stride
        query_position = tl.load(positions_pointer + query_rows, mask=query_rows < query_end, other=0)

    if RESIDENT:
        key_rows = key_start + tl.arange(0, BLOCK_KEY)
        key = load_tile(key_pointer, key_rows, key_end, key_row_stride, head_dim, BLOCK_DIM)
        value = load_tile(value_pointer, key_rows, key_end, value_row_stride, head_dim, BLOCK_DIM)
        scores = scores_of(
            query,
            key,
            key_rows,
            key_end,
            query_position,
            bias_pointer,
            positions_pointer,
            distance_stride,
            score_scale,
            grid_rows,
            grid_columns,
        )
        highest = tl.maximum(tl.max(scores, axis=1), LOWEST)
        weights = tl.exp2(scores - highest[:, None])
        total = tl.sum(weights, axis=1)
        summed = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    else:
        highest = tl.full((BLOCK_QUERY,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_QUERY,), tl.float32)
        summed = tl.zeros((BLOCK_QUERY, BLOCK_DIM), tl.float32)
        for first in range(key_start, key_end, BLOCK_KEY):
            key_rows = first + tl.arange(0, BLOCK_KEY)
            key = load_tile(key_pointer, key_rows, key_end, key_row_stride, head_dim, BLOCK_DIM)
            scores = scores_of(
                query,
                key,
                key_rows,
                key_end,
                query_position,
                bias_pointer,
                positions_pointer,
                distance_stride,
                score_scale,
                grid_rows,
                grid_columns,
            )
            value = load_tile(value_pointer, key_rows, key_end, value_row_stride, head_dim, BLOCK_DIM)
            raised = tl.maximum(highest, tl.max(scores, axis=1))
            shrink = tl.exp2(highest - raised)
            weights = tl.exp2(scores - raised[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            summed = tl.dot(weights.to(value.dtype), value, summed * shrink[:, None], input_precision="ieee")
            highest = raised

    summed = summed / tl.where(total == 0, 1.0, total)[:, None]
    column = tl.arange(0, BLOCK_DIM)
    out_rows = (query_rows.to(tl.int64) * heads + head) * head_dim
    live = (query_rows < query_end)[:, None] & (column < head_dim)[None, :]
    out_pointers = out_pointer + out_rows[:, None] + column[None, :]
    tl.store(out_pointers, summed.to(out_pointer.dtype.element_ty), mask=live)


class Tile(NamedTuple):
    """What one program holds, and how it is compiled."""

    BLOCK_QUERY: int
    BLOCK_KEY: int  # the whole segment is one block of keys where it fits
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None  # set where the assembler, left alone, takes fewer registers and spills


# Longest segment of keys: the tile, for (head_dim > 64?, bias?) in half precision and (head_dim > 64?) in float32. A
# tile of the segment's own size while its scores fit the registers, up to 128 keys; then a loop over blocks of keys,
# which also ends early for the short segments of a ragged batch. Chosen from what compiles without spills for sm_80,
# sm_90 and sm_100 (bench/results/static.md). On a GPU nothing has been measured yet; bench/tune_attention.py does.
LONG = 1 << 30
HEAVY = {  # a wide head or a bias takes more registers
    16: Tile(16, 16, 2),
    32: Tile(32, 32, 4),
    64: Tile(64, 64, 4),
    128: Tile(64, 128, 8),
    LONG: Tile(64, 32, 8),
}
HALF_TILES = {
    (False, False): {
        16: Tile(16, 16, 1),
        32: Tile(32, 32, 2),
        64: Tile(64, 64, 4),
        128: Tile(128, 128, 8),
        LONG: Tile(128, 64, 8, 3),
    },
    (False, True): {**HEAVY, LONG: Tile(64, 32, 8, maxnreg=255)},
    (True, False): HEAVY,
    (True, True): HEAVY,
}
FLOAT32_TILES = {
    False: {16: Tile(16, 16, 2), LONG: Tile(32, 32, 8)},
    True: {16: Tile(16, 16, 4), LONG: Tile(16, 32, 8, 1, maxnreg=128)},
}


@functools.cache
def tile_for(max_seqlen_q: int, max_seqlen_k: int, head_dim: int, is_float32: bool, has_bias: bool) -> Tile:
    """The tile of such segments. Few queries, as a pool's latent ones are, share a tile of 16 rows."""
    is_wide = head_dim > 64
    tiles = FLOAT32_TILES[is_wide] if is_float32 else HALF_TILES[is_wide, has_bias]
    tile = tiles[min(longest for longest in tiles if longest >= max_seqlen_k)]
    if max_seqlen_q <= 16 < tile.BLOCK_QUERY:
        return Tile(16, 64, 8, maxnreg=128) if is_wide else Tile(16, min(tile.BLOCK_KEY, 64), 4)
    return tile


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    bias_table: Tensor | None,
    positions: Tensor | None,
    grid_size: tuple[int, int],
    skip_keys: int,
) -> Tensor:
    """See :func:`ops.varlen_attention`."""
    out = query.new_empty(query.shape)
    total, heads, head_dim = query.shape
    if total == 0 or heads == 0 or head_dim == 0 or max_seqlen_q == 0:
        return out
    # Rows are read in one piece; only a tensor whose innermost elements lie apart is copied first.
    query, key, value = (t if t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    scale = head_dim**-0.5 if scale is None else scale
    tile = tile_for(max_seqlen_q, max_seqlen_k, head_dim, query.dtype == torch.float32, bias_table is not None)
    query_blocks = triton.cdiv(max_seqlen_q, tile.BLOCK_QUERY)
    strides = (*query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    unit = 1 if any(stride % 8 for stride in strides) else 8
    with torch.cuda.device_of(query):
        # Launches a 1D grid: for each segment each block of queries for each head.
        varlen_attention_kernel[((cu_seqlens_q.shape[0] - 1) * query_blocks * heads,)](
            query,
            key,
            value,
            cu_seqlens_q.contiguous(),
            cu_seqlens_k.contiguous(),
            bias_table,
            None if positions is None else positions.contiguous(),
            out,
            scale * LOG2_E.value,
            heads,
            query_blocks,
            *(stride // unit for stride in strides),
            *((0, 0) if bias_table is None else bias_table.stride()),
            *grid_size,
            skip_keys,
            head_dim=head_dim,
            STRIDE_UNIT=unit,
            BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)),
            RESIDENT=max_seqlen_k <= tile.BLOCK_KEY,
            # not every GPU's compiler knows of maxnreg
            **{name: value for name, value in tile._asdict().items() if value is not None},
        )
    return out
