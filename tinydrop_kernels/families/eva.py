"""timm's ``Eva``: EVA, EVA-02, DINOv3, PE, and ViTs with rotary embeddings, axial or mixed."""

from functools import partial
from types import MappingProxyType
from typing import Any

from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva as TimmEva
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor

from tinydrop_kernels.families.blocks import attend_projected, project_fused
from tinydrop_kernels.families.plain import PlainFamily
from tinydrop_kernels.families.pools import pool_segments
from tinydrop_kernels.families.rotary import PackedRope, embedding_at
from tinydrop_kernels.ops.types import Packed, Part, TimmModule

_PARTS = {"qkv", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"}


class Eva(PlainFamily):
    """Transformers with rotary embeddings, and EVA models without them."""

    name = "Eva (EVA, EVA-02, DINOv3, PE, ViTs with rotary embeddings)"
    reads_positions = True
    model_types = (TimmEva,)
    block_types = (EvaBlock, EvaBlockPostNorm)
    attention_types = MappingProxyType({EvaAttention: _PARTS, AttentionRope: _PARTS})

    def attend(
        self,
        attention: TimmModule,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Any = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the output of timm's ``EvaAttention`` or ``AttentionRope``.

        ``x`` holds packed tokens ``(total, dim)`` if ``attn_mask`` is a :class:`Packed` layout. ``rope`` is then
        ``(total, 1 or heads, 2 * head_dim)``, sines before cosines. Otherwise timm's own forward runs.
        """
        if not isinstance(attn_mask, Packed):
            masks = {"attn_mask": attn_mask, "is_causal": is_causal}
            dense: Tensor = type(attention).forward(attention, x, rope=rope, **masks)
            return dense
        if attention.qkv is None:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (project(x).view(len(x), -1, attention.head_dim) for project in projections)
        elif isinstance(attention, EvaAttention):
            query, key, value = project_fused(attention, x)
        else:
            query, key, value = attention.qkv(x).view(len(x), 3, attention.num_heads, attention.head_dim).unbind(1)
        turn = None if rope is None else partial(apply_rot_embed_cat, emb=rope, half=attention.rotate_half)
        return attend_projected(attention, x, query, key, value, attn_mask, attn_mask, turn)

    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        rope = PackedRope(model.rope, model.rope_mixed, packed, parts)
        for i, block in enumerate(model.blocks):
            tokens = block(tokens, rope=rope.of_block(i), attn_mask=packed)
        return model.norm(tokens), packed

    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        skip = 0 if model.global_pool == "map" else model.num_prefix_tokens
        logits: Tensor = model.head(model.head_drop(model.fc_norm(pool_segments(model, tokens, packed, skip))))
        return logits

    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        embedded: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images))[0])
        return embedded

    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        # The trial may pass only the first patches of the grid, so take only their embeddings.
        rope, patches = None, tokens.shape[1] - model.num_prefix_tokens
        if model.rope is not None:
            rope = embedding_at(model.rope, tuple(model.patch_embed.grid_size))[..., :patches, :]
        for i, block in enumerate(model.blocks):
            tokens = block(tokens, rope=rope[i] if rope is not None and model.rope_mixed else rope)
        encoded: Tensor = model.norm(tokens)
        return encoded
