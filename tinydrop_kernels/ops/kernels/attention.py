"""The launch of the attention kernel. Tile, strides and compiled kernel are found once for all layers of a forward."""

import functools
import math

import torch
import triton
from torch import Tensor

from tinydrop_kernels.ops.kernels.attention_kernel import varlen_attention_kernel
from tinydrop_kernels.ops.kernels.attention_tiles import tile_for
from tinydrop_kernels.ops.kernels.launcher import Launcher, LaunchPlan, aligned

MAX_STRIDE = 2**24  # keeps the offsets within a tile in 32 bits


@functools.lru_cache(maxsize=64)
def plan_launch(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    query_stride: tuple[int, ...],
    key_stride: tuple[int, ...],
    value_stride: tuple[int, ...],
    segments: int,
    total_k: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    table: tuple[torch.dtype, tuple[int, int]] | None,
    grid_size: tuple[int, int],
    skip_keys: int,
) -> LaunchPlan | None:
    """Return the launch plan for arguments of this kind.

    Args:
        shape: query's shape.
        segments: at least 1.
        table: dtype and strides of a bias's table, or None without a bias.

    Returns:
        The plan. None if the last stride is not 1, or if rows or heads are more than ``MAX_STRIDE`` elements apart.
    """
    strides = (*query_stride[:2], *key_stride[:2], *value_stride[:2])
    if not query_stride[2] == key_stride[2] == value_stride[2] == 1 or max(strides) > MAX_STRIDE:
        return None
    _, heads, head_dim = shape
    tile = tile_for(
        max_seqlen_q, max_seqlen_k, total_k // segments, head_dim, dtype == torch.float32, table is not None
    )
    query_blocks = -(-max_seqlen_q // tile.BLOCK_QUERY)
    unit = 1 if any(stride % 8 for stride in strides) else 8
    is_resident = max_seqlen_k <= tile.BLOCK_KEY
    block_dim = max(16, triton.next_power_of_2(head_dim))
    constants = (head_dim, unit, tile.BLOCK_QUERY, tile.BLOCK_KEY, block_dim, is_resident)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.maxnreg is not None:  # set only if needed, because not every GPU's compiler accepts it
        options["maxnreg"] = tile.maxnreg
    numbers = (
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        heads,
        query_blocks,
        *(stride // unit for stride in strides),
        *((table[1][0], table[1][1] if heads > 1 else 0) if table else (0, 0)),  # one head may have any stride
        *grid_size,
        min(skip_keys, max_seqlen_k),
        *constants,
    )
    grid = (segments * query_blocks * heads, 1, 1)  # one program per segment, block of queries and head
    same = (dtype, table and table[0], constants, tile)
    return LaunchPlan(Launcher(varlen_attention_kernel, device, same, options), numbers, grid)


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
    """Run :func:`ops.varlen_attention`. Arguments without a launch plan are copied to be contiguous first."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    segments = cu_seqlens_q.shape[0] - 1
    if segments == 0 or max_seqlen_q == 0 or out.numel() == 0:
        return out
    plan = plan_launch(
        query.device,
        query.dtype,
        query.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        segments,
        key.shape[0],
        max_seqlen_q,
        max_seqlen_k,
        scale,
        None if bias_table is None else (bias_table.dtype, bias_table.stride()),
        tuple(grid_size),
        skip_keys,
    )
    if plan is None:
        query, key, value = (t.clone(memory_format=torch.contiguous_format) for t in (query, key, value))
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return launch(query, key, value, *lengths, scale, bias_table, positions, grid_size, skip_keys)
    tensors = (query, key, value, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    bias = (bias_table, None if positions is None else positions.contiguous())
    plan.launcher(plan.grid, (*tensors, *bias, out, *plan.numbers), aligned(query, key, value))
    return out
