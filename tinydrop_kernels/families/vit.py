"""timm's ``VisionTransformer`` and ``VisionTransformerDistilled``: ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, FlexiViT.

The code was compared with timm 1.0.31.
"""

from types import MappingProxyType
from typing import Any

import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.families.blocks import attend_projected, reads_prefix_alone, run_last_block
from tinydrop_kernels.families.costs import flops_of
from tinydrop_kernels.families.plain import PlainFamily
from tinydrop_kernels.families.pools import pool_segments
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule

_PARTS = {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class Vit(PlainFamily):
    """Plain Vision Transformers. If the head reads only prefix tokens, the last block computes only those."""

    name = "VisionTransformer (ViT, DeiT, DeiT distilled, DeiT-3, DINOv2, CLIP and SigLIP towers, FlexiViT)"
    model_types = (VisionTransformerDistilled, VisionTransformer)
    block_types = (Block, ResPostBlock)
    attention_types = MappingProxyType({Attention: _PARTS})

    def attend(self, attention: TimmModule, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
        """Return the output of ``timm.layers.Attention``.

        ``x`` holds packed tokens ``(total, dim)`` if ``attn_mask`` is a :class:`Packed` layout. Otherwise timm's own
        forward runs.
        """
        if not isinstance(attn_mask, Packed):
            if isinstance(x, torch.fx.Proxy):
                raise TypeError("model: a patched model cannot be traced by torch.fx; use torch.compile, or unpatch it")
            dense: Tensor = type(attention).forward(attention, x, attn_mask=attn_mask, is_causal=is_causal)
            return dense
        query, key, value = attention.qkv(x).view(-1, 3, attention.num_heads, attention.head_dim).unbind(1)
        return attend_projected(attention, x, query, key, value, attn_mask, attn_mask)

    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        *others, last = model.blocks
        for block in others:
            tokens = block(tokens, attn_mask=packed)
        if model.global_pool == "token" and reads_prefix_alone(last) and not read_all:
            tokens, packed = run_last_block(last, tokens, packed, model.num_prefix_tokens)
        else:
            tokens = last(tokens, attn_mask=packed)
        return model.norm(tokens), packed

    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        logits: Tensor
        if model.global_pool == "token":  # the class token, then the distillation token if the model has one
            read = 2 if isinstance(model, VisionTransformerDistilled) else 1
            rows = [ops.segment_pool(tokens, packed.cu_seqlens, "first", skip=i) for i in range(read)]
            logits = model.forward_head(torch.stack(rows, dim=1))
            return logits
        pooled = pool_segments(model, tokens, packed, _pool_skip(model))
        logits = model.head(model.head_drop(model.fc_norm(pooled)))
        return logits

    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        embedded: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return embedded

    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        encoded: Tensor = model.norm(model.blocks(tokens))
        return encoded

    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        last_reads_prefix = model.global_pool == "token" and reads_prefix_alone(model.blocks[-1])
        return flops_of(model, counts, grid, True, _pool_skip(model), last_reads_prefix)

    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        return images * flops_of(model, [grid[0] * grid[1]], grid, False, _pool_skip(model))


def _pool_skip(model: TimmModule) -> int:
    skip: int = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return skip
