"""The attention kernel: FlashAttention's arithmetic (arXiv 2205.14135) on tiles for segments of 1 to 260 tokens."""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
# Below every score, but finite. With -inf, a query without visible keys would compute -inf - -inf = NaN; with this
# number its weights are 0.
LOWEST = tl.constexpr(-3e38)


@triton.jit
def load_tile(pointer, rows, row_stride, head_dim: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load rows of one head, of shape [BLOCK_ROWS, BLOCK_DIM]; zeros from row ``rows`` and column ``head_dim`` on."""
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_DIM)
    pointers = pointer + (row[:, None] * row_stride + column[None, :])
    return tl.load(pointers, mask=(row < rows)[:, None] & (column < head_dim)[None, :], other=0.0)


@triton.jit
def table_code(position, grid_columns):
    """Encode a patch as one number, so that differences of codes index the relative position table."""
    return position + position // grid_columns * (grid_columns - 1)


@triton.jit
def scores_of(
    query,
    key,
    first,
    key_end,
    query_position,
    bias_pointer,
    positions_pointer,
    distance_stride,
    score_scale,
    grid_rows,
    grid_columns,
    BLOCK_KEY: tl.constexpr,
):
    """Compute the products of queries and keys, -inf where there is no key. With a bias: final scores, in base 2.

    Args:
        query: of shape [BLOCK_QUERY, BLOCK_DIM].
        key: of shape [BLOCK_KEY, BLOCK_DIM].
        first: packed row of the first key.
        key_end: packed row behind the segment's last key.
        query_position: patch of each query, negative at the class token, of shape [BLOCK_QUERY].
        bias_pointer: the head's column of the table, or None.
        positions_pointer: patch of each packed row, of shape [total].

    Returns:
        float32, of shape [BLOCK_QUERY, BLOCK_KEY].
    """
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    key_rows = first + tl.arange(0, BLOCK_KEY)
    is_key = key_rows < key_end
    if bias_pointer is not None:
        key_position = tl.load(positions_pointer + key_rows, mask=is_key, other=0)
        distances = (2 * grid_rows - 1) * (2 * grid_columns - 1)
        from_code = table_code(query_position, grid_columns) + distances // 2
        distance = from_code[:, None] - table_code(key_position, grid_columns)[None, :]
        from_class, to_class = (query_position < 0)[:, None], (key_position < 0)[None, :]
        distance = tl.where(from_class, distances, distance)
        distance = tl.where(to_class, tl.where(from_class, distances + 2, distances + 1), distance)
        bias = tl.load(bias_pointer + distance * distance_stride, mask=is_key[None, :], other=0.0)
        scores = tl.fma(scores, score_scale, bias.to(tl.float32) * LOG2_E)
    if first + BLOCK_KEY > key_end:  # only in a segment's last block
        scores = tl.where(is_key[None, :], scores, -float("inf"))
    return scores


@triton.jit
def highest_of(scores, score_scale, IS_FINAL: tl.constexpr):
    """Return the highest score of each query, in base 2, of shape [BLOCK_QUERY]."""
    highest = tl.max(scores, axis=1)
    return highest if IS_FINAL else highest * score_scale


@triton.jit
def weights_of(scores, highest, score_scale, IS_FINAL: tl.constexpr):
    """Return each key's weight relative to the weight of the highest score, of shape [BLOCK_QUERY, BLOCK_KEY].

    A rounding error of ``highest`` scales all weights of a query equally, so the final division cancels it.
    """
    if IS_FINAL:
        return tl.exp2(scores - highest[:, None])
    return tl.exp2(tl.fma(scores, score_scale, -highest[:, None]))


# Do not specialise on these numbers, nor on the alignment of the small tensors; otherwise batches would recompile.
INTEGERS = ["heads", "query_blocks", "query_row_units", "query_head_units", "key_row_units", "key_head_units"]
INTEGERS += ["value_row_units", "value_head_units", "distance_stride", "bias_head_stride", "grid_rows", "grid_columns"]
ANYWHERE = ["cu_seqlens_q_pointer", "cu_seqlens_k_pointer", "bias_pointer", "positions_pointer"]


@triton.jit(do_not_specialize=[*INTEGERS, "skip_keys"], do_not_specialize_on_alignment=ANYWHERE)
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
    """Attend from one block of a segment's queries to all of its keys, for one head.

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
        grid_rows, grid_columns: the patch grid that the table belongs to.
        skip_keys: number of keys at the start of each segment to leave out.
        head_dim: elements of a head.
        STRIDE_UNIT: elements per unit of the row and head strides. Of a stride itself Triton can only learn that 16
            divides it. Without the unit, heads of 72 and 88 elements would be loaded two bytes at a time.
        BLOCK_QUERY, BLOCK_KEY: size of a tile of scores.
        BLOCK_DIM: at least head_dim.
        RESIDENT: whether BLOCK_KEY holds the longest segment. If so, one tile of scores and no running softmax.
    """
    # This program processes BLOCK_QUERY queries of one head of one segment. Neighbouring programs have different heads,
    # because heads are adjacent in memory. Next come the segment's other queries, which find its keys in the L2 cache.
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    segment = program // heads // query_blocks
    query_end = tl.load(cu_seqlens_q_pointer + segment + 1)
    query_start = tl.load(cu_seqlens_q_pointer + segment) + program // heads % query_blocks * BLOCK_QUERY
    if query_start >= query_end:
        return
    key_start = tl.load(cu_seqlens_k_pointer + segment) + skip_keys
    key_end = tl.load(cu_seqlens_k_pointer + segment + 1)

    query_row_stride = query_row_units * STRIDE_UNIT
    key_row_stride = key_row_units * STRIDE_UNIT
    value_row_stride = value_row_units * STRIDE_UNIT
    query_rows = query_start + tl.arange(0, BLOCK_QUERY)
    query_pointer += query_start.to(tl.int64) * query_row_stride + head * query_head_units * STRIDE_UNIT
    key_pointer += key_start.to(tl.int64) * key_row_stride + head * key_head_units * STRIDE_UNIT
    value_pointer += key_start.to(tl.int64) * value_row_stride + head * value_head_units * STRIDE_UNIT
    query = load_tile(query_pointer, query_end - query_start, query_row_stride, head_dim, BLOCK_QUERY, BLOCK_DIM)
    query_position = query_rows
    if bias_pointer is not None:
        bias_pointer += head * bias_head_stride
        query_position = tl.load(positions_pointer + query_rows, mask=query_rows < query_end, other=0)

    IS_FINAL: tl.constexpr = bias_pointer is not None
    if RESIDENT:
        key = load_tile(key_pointer, key_end - key_start, key_row_stride, head_dim, BLOCK_KEY, BLOCK_DIM)
        value = load_tile(value_pointer, key_end - key_start, value_row_stride, head_dim, BLOCK_KEY, BLOCK_DIM)
        scores = scores_of(
            query,
            key,
            key_start,
            key_end,
            query_position,
            bias_pointer,
            positions_pointer,
            distance_stride,
            score_scale,
            grid_rows,
            grid_columns,
            BLOCK_KEY,
        )
        highest = tl.maximum(highest_of(scores, score_scale, IS_FINAL), LOWEST)
        weights = weights_of(scores, highest, score_scale, IS_FINAL)
        total = tl.sum(weights, axis=1)
        summed = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    else:
        highest = tl.full((BLOCK_QUERY,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_QUERY,), tl.float32)
        summed = tl.zeros((BLOCK_QUERY, BLOCK_DIM), tl.float32)
        for first in range(key_start, key_end, BLOCK_KEY):
            key = load_tile(key_pointer, key_end - first, key_row_stride, head_dim, BLOCK_KEY, BLOCK_DIM)
            scores = scores_of(
                query,
                key,
                first,
                key_end,
                query_position,
                bias_pointer,
                positions_pointer,
                distance_stride,
                score_scale,
                grid_rows,
                grid_columns,
                BLOCK_KEY,
            )
            value = load_tile(value_pointer, key_end - first, value_row_stride, head_dim, BLOCK_KEY, BLOCK_DIM)
            raised = tl.maximum(highest, highest_of(scores, score_scale, IS_FINAL))
            shrink = tl.exp2(highest - raised)
            weights = weights_of(scores, raised, score_scale, IS_FINAL)
            total = total * shrink + tl.sum(weights, axis=1)
            summed = tl.dot(weights.to(value.dtype), value, summed * shrink[:, None], input_precision="ieee")
            highest = raised
            # Advance the pointers, because this is cheaper than a 64-bit product for each block.
            key_pointer += BLOCK_KEY * key_row_stride
            value_pointer += BLOCK_KEY * value_row_stride

    summed *= (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    column = tl.arange(0, BLOCK_DIM)
    out_rows = (query_rows.to(tl.int64) * heads + head) * head_dim
    live = (query_rows < query_end)[:, None] & (column < head_dim)[None, :]
    out_pointers = out_pointer + out_rows[:, None] + column[None, :]
    tl.store(out_pointers, summed.to(out_pointer.dtype.element_ty), mask=live)
