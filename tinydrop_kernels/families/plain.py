"""The common part of ViT, BEiT and EVA: timm's patch embedding, and blocks that all keep one token per patch."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tinydrop_kernels.families import costs, embedding
from tinydrop_kernels.families.base import Family
from tinydrop_kernels.families.checks import foreign_block, foreign_method, passed_over
from tinydrop_kernels.families.grids import coarser_grids
from tinydrop_kernels.families.pools import POOLS, unsupported_pool
from tinydrop_kernels.ops.types import Grid, TimmModule


class PlainFamily(Family):
    """A family of isotropic transformers. A subclass names timm's classes and runs their blocks.

    Classes and methods are compared with timm's own by identity. A model that overrides one of them is refused,
    because its packed forward could return wrong answers.

    Attributes:
        model_types: supported model classes, the most derived first.
        methods: names of the model's methods that must be timm's own.
        block_types: supported classes of ``model.blocks``.
        attention_types: supported classes of each block's ``attn``, with the names of the children that each may have.
        pools: supported values of ``global_pool``.
    """

    model_types: tuple[type, ...]
    methods: tuple[str, ...] = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
    block_types: tuple[type, ...]
    attention_types: Mapping[type, set[str]]
    pools: tuple[str, ...] = POOLS

    def accepts(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_types)

    def unsupported_reason(self, model: TimmModule) -> str | None:
        base = next(known for known in self.model_types if isinstance(model, known))
        return (
            foreign_method(model, base, self.methods)
            or unsupported_pool(model, self.pools)
            or foreign_block(model, self.block_types, self.attention_types)
            or passed_over(model)
        )

    def settings(self, model: TimmModule) -> tuple[Any, ...]:
        return model.global_pool, tuple(vars(model))  # a method that is replaced on the instance adds a name

    def attentions(self, model: TimmModule) -> list[nn.Module]:
        return [block.attn for block in model.blocks]

    def grid_size(self, model: TimmModule, images: Tensor) -> Grid:
        rows, columns = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
        return rows, columns

    def num_prefix_tokens(self, model: TimmModule) -> int:
        count: int = model.num_prefix_tokens
        return count

    def levels(self, model: TimmModule, grid: Grid) -> list[Grid]:
        return coarser_grids(grid) if embedding.embeds_kept_only(model) else [grid]

    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        height, width = model.patch_embed.proj.weight.shape[-2:]
        return height, width

    def trial_patches(self, model: TimmModule, grid: Grid) -> int:
        return min(3, grid[0] * grid[1])

    def embed(
        self, model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
    ) -> Tensor:
        if not embedding.embeds_kept_only(model):
            tokens = self.dense_embed(model, images)
            return embedding.gather_kept(tokens, model.num_prefix_tokens, indices, cu_seqlens, total)
        tokens = embedding.embed_kept(model, images, indices, cu_seqlens, total, grid)
        normed: Tensor = model.norm_pre(tokens) if hasattr(model, "norm_pre") else tokens
        return normed

    def dense_classify(self, model: TimmModule, tokens: Tensor) -> Tensor:
        logits: Tensor = model.forward_head(tokens)
        return logits

    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        return costs.flops_of(model, counts, grid, is_packed=True)

    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        return images * costs.flops_of(model, [grid[0] * grid[1]], grid, is_packed=False)
