"""timm's ``SwinTransformer`` and ``SwinTransformerV2``: attention within windows, on grids that halve at every stage.

What :class:`Family` calls a patch is a cell here: one position of the last stage's grid, with all tokens that merge
into it. A cell is kept or dropped as a whole. :mod:`families.swin_windows` describes the order of its tokens. The kept
tokens of a window form one segment. At a coarser grid, windows and biases are those that timm's ``set_input_size``
would set.

The forward of timm's blocks takes a dense grid, so it is not called. The norms, projections and MLPs inside it are
called one by one. Hooks on modules that are not called are refused.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.families import embedding, swin_checks, swin_costs
from tinydrop_kernels.families.base import Family
from tinydrop_kernels.families.blocks import project_fused
from tinydrop_kernels.families.embedding import embeds_kept_only
from tinydrop_kernels.families.grids import coarser_grids
from tinydrop_kernels.families.swin_checks import POOL_MODES, unsupported_swin
from tinydrop_kernels.families.swin_windows import (
    Order,
    cell_side,
    cut_of,
    is_whole,
    merges,
    order_by_windows,
    patch_numbers,
    stages_of,
)
from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import Grid, Packed, Part, RelativeBias, TimmModule
from tinydrop_kernels.torch_internals import eager, eager_outside

_METHODS = ("forward", "forward_features", "forward_head")
MAX_LOG_SCALE = math.log(100)  # upper bound of the logit_scale in SwinV2's attention


class Swin(Family):
    """Hierarchical transformers. A patch is a cell of the last stage's grid."""

    name = "SwinTransformer, SwinTransformerV2"
    reads_positions = True

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, SwinTransformer | SwinTransformerV2)

    def unsupported_reason(self, model: TimmModule) -> str | None:
        return unsupported_swin(model, _METHODS)

    def settings(self, model: TimmModule) -> tuple[Any, ...]:
        return swin_checks.settings(model)

    def attentions(self, model: TimmModule) -> list[nn.Module]:
        return []  # encode calls the children of each attention itself

    def grid_size(self, model: TimmModule, images: Tensor) -> Grid:
        # Return the grid of the last stage, because a patch is a cell of that grid.
        rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        side = cell_side(model)
        return rows // side, columns // side

    def num_prefix_tokens(self, model: TimmModule) -> int:
        return 0

    def levels(self, model: TimmModule, grid: Grid) -> list[Grid]:
        # Return the dense grid alone if timm would pad a coarser one, because padding takes part in timm's attention.
        if not embeds_kept_only(model, with_norm=True):
            return [grid]
        grids = coarser_grids(grid)
        for number, (stage, side) in enumerate(stages_of(model)):
            if not all(is_whole(cut_of(model, number, stage.blocks[0], own, side), own, side) for own in grids):
                return [grid]
        return grids

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        # Return the size of a cell, because a patch is a cell of the last stage's grid.
        side = cell_side(model)
        height, width = model.patch_embed.proj.weight.shape[-2:]
        return height * side, width * side

    def embed(
        self, model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
    ) -> Tensor:
        # Return ``(total * patches per cell, dim)``, the patches of each cell in Z-order.
        side = cell_side(model)
        if not embeds_kept_only(model, with_norm=True):
            cells = self.dense_embed(model, images).unflatten(1, (-1, side**2)).flatten(2)
            kept = ops.gather_tokens(cells, cells.new_empty(len(cells), 0, cells.shape[2]), indices, cu_seqlens, total)
            return kept.view(total * side**2, -1)
        projection = model.patch_embed.proj
        prefix = projection.weight.new_empty(0, projection.out_channels)
        images, weight, bias, prefix = embedding.autocast(images, projection.weight, projection.bias, prefix)
        numbers = patch_numbers(indices, grid, side).flatten(1)
        tokens = ops.embed_tokens(images, weight, bias, prefix, None, numbers, cu_seqlens * side**2, total * side**2)
        normed: Tensor = model.patch_embed.norm(tokens)
        return normed

    @eager_outside  # windows differ per batch, so only functions that do not depend on them are compiled
    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        # The tokens arrive in the order of :func:`embed`. One token per cell is returned.
        assert packed.positions is not None
        for number, (stage, side) in enumerate(stages_of(model)):
            if merges(stage):
                four = tokens.view(-1, 2, 2, tokens.shape[1]).transpose(1, 2)  # from Z-order to (row, column)
                tokens = stage.downsample(four).flatten(0, 2)
            cuts = [tuple(cut_of(model, number, block, part.grid, side) for part in parts) for block in stage.blocks]
            orders = {cut: order_by_windows(packed.positions, parts, cut, side) for cut in dict.fromkeys(cuts)}
            at_hand = None
            for block, cut in zip(stage.blocks, cuts, strict=True):
                order = orders[cut]
                if order is not at_hand:  # reorder from the last block's windows to this block's
                    rows = order.rows if at_hand is None else at_hand.places[order.rows]
                    tokens, at_hand = tokens.index_select(0, rows), order
                tokens = _run_block(block, tokens, order)
            if at_hand is not None:
                tokens = tokens.index_select(0, at_hand.places)
        return model.norm(tokens), packed

    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        head = model.head
        pool: str = head.global_pool.pool_type
        rows = [ops.segment_pool(tokens, packed.cu_seqlens, mode) for mode in POOL_MODES[pool]]
        pooled = torch.stack(rows).mean(dim=0) if pool == "avgmax" else torch.cat(rows, dim=1)
        logits: Tensor = head.flatten(head.fc(head.drop(pooled)))
        return logits

    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        # Return the tokens in the order of :func:`embed`.
        patches: Tensor = model.patch_embed(images).flatten(1, 2)
        return patches[:, _raster(model, patches)]

    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        # The tokens arrive in the order of :func:`embed`. One token per cell is returned.
        patches = torch.empty_like(tokens)
        patches[:, _raster(model, tokens)] = tokens
        encoded: Tensor = model.norm(model.layers(patches.unflatten(1, model.patch_embed.grid_size)))
        return encoded.flatten(1, 2)

    def dense_classify(self, model: TimmModule, tokens: Tensor) -> Tensor:
        side, (rows, columns) = cell_side(model), model.patch_embed.grid_size
        logits: Tensor = model.forward_head(tokens.unflatten(1, (rows // side, columns // side)))
        return logits

    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        return swin_costs.flops(model, counts, grid)

    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        return swin_costs.dense_flops(model, images, grid)


@eager_outside
def _run_block(block: TimmModule, x: Tensor, order: Order) -> Tensor:
    """Run a block on tokens ``(total, dim)`` in this order. V1 norms the input of each branch, V2 the output."""
    if type(block) is SwinTransformerV2Block:
        x = x + block.drop_path1(block.norm1(_attend(block.attn, x, order)))
        x = x + block.drop_path2(block.norm2(block.mlp(x)))
        return x
    x = x + block.drop_path1(_attend(block.attn, block.norm1(x), order))
    x = x + block.drop_path2(block.mlp(block.norm2(x)))
    return x


@eager
def _attend(attention: TimmModule, x: Tensor, order: Order) -> Tensor:
    if type(attention) is WindowAttention:
        query, key, value = project_fused(attention, x)
        log_scale = attention.logit_scale[:, 0].clamp(max=MAX_LOG_SCALE)
        query, scale = F.normalize(query, dim=-1) * log_scale.exp(), 1.0
        query, key = query.to(value.dtype), F.normalize(key, dim=-1).to(value.dtype)
    else:
        query, key, value = attention.qkv(x).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        scale = attention.scale
    out = []
    for windows in order.windows:
        q, k, v = query[windows.rows], key[windows.rows], value[windows.rows]
        bias = RelativeBias(_bias_table(attention, windows.size), windows.positions, windows.size)
        area = windows.size[0] * windows.size[1]
        out.append(ops.varlen_attention(q, k, v, windows.cu_seqlens, windows.cu_seqlens, area, area, scale, bias))
    joined = out[0] if len(out) == 1 else torch.cat(out)
    answer: Tensor = attention.proj_drop(attention.proj(joined.flatten(1)))
    return answer


def _bias_table(attention: TimmModule, size: Grid) -> Tensor:
    """Return the relative position bias of an attention for windows of this size: ``(distances, heads)``."""
    own = tuple(attention.window_size)
    if type(attention) is WindowAttention:
        first, _, last = attention.cpb_mlp
        weights = (last.weight, first.weight, first.bias, attention.relative_coords_table)
        return derived(weights, size, lambda: _continuous_bias(attention, size))
    table: Tensor = attention.relative_position_bias_table
    if size == own:
        return table
    shape = ((2 * size[0] - 1) * (2 * size[1] - 1), attention.num_heads)
    resized: Tensor = derived(table, (own, size), lambda: resize_rel_pos_bias_table(table, size, shape, own))
    return resized


def _continuous_bias(attention: TimmModule, size: Grid) -> Tensor:
    coordinates = attention.relative_coords_table
    if size != tuple(attention.window_size):
        state = SimpleNamespace(window_size=size, pretrained_window_size=attention.pretrained_window_size)
        make = type(attention)._make_pair_wise_relative_positions
        coordinates, _ = make(state, device=coordinates.device, dtype=coordinates.dtype)
    with torch.autocast(coordinates.device.type, enabled=False):  # because calls without autocast reuse the table
        table: Tensor = attention.cpb_mlp(coordinates).view(-1, attention.num_heads)
    return 16 * table.sigmoid()


def _raster(model: TimmModule, tokens: Tensor) -> Tensor:
    """Return the patch number of each packed row if all cells are kept: int64 ``(patches,)``."""
    side, (rows, columns) = cell_side(model), model.patch_embed.grid_size
    cells = torch.arange(rows * columns // side**2, dtype=torch.int32, device=tokens.device)
    return patch_numbers(cells, (rows // side, columns // side), side).flatten().long()
