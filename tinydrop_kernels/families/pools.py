"""timm's pools on packed tokens. They reduce each segment to one row per image."""

import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor

from tinydrop_kernels import ops
from tinydrop_kernels.ops.types import Packed, TimmModule

POOLS = ("token", "avg", "max", "avgmax", "map")
_MODES = {"token": ["first"], "avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"]}
_MAP_POOL_PARTS = {"q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"}


def unsupported_pool(model: TimmModule, pools: tuple[str, ...] = POOLS) -> str | None:
    """Return a description of an unsupported pool, or None if it is supported. Only attributes are read."""
    if model.global_pool not in pools:
        return f"global_pool={model.global_pool!r}; supported are {', '.join(pools)}"
    if model.global_pool == "map":
        pool = model.attn_pool
        unknown = {name for name, _ in pool.named_children()} - _MAP_POOL_PARTS
        if type(pool) is not AttentionPoolLatent or pool.pos_embed is not None or pool.pool != "token" or unknown:
            return "an attn_pool other than timm's AttentionPoolLatent as configured for SigLIP"
    return None


def pool_segments(model: TimmModule, tokens: Tensor, packed: Packed, skip: int) -> Tensor:
    """Apply ``model.pool`` to packed tokens and return ``(segments, dim)``.

    Args:
        model: a model whose ``global_pool`` is one of :data:`POOLS`.
        tokens: ``(total, dim)``.
        packed: layout of the tokens.
        skip: tokens at the start of each segment that every pool except ``"token"`` leaves out.
    """
    if model.global_pool == "map":
        return _map_pool(model.attn_pool, tokens, packed, skip)
    skip = 0 if model.global_pool == "token" else skip
    modes = _MODES[model.global_pool]
    rows = [ops.segment_pool(tokens, packed.cu_seqlens, mode, skip) for mode in modes]
    return rows[0] if len(rows) == 1 else torch.stack(rows).mean(dim=0)


def _map_pool(pool: TimmModule, tokens: Tensor, packed: Packed, skip: int) -> Tensor:
    """Apply ``AttentionPoolLatent`` to segments. The latent queries skip the first ``skip`` tokens of each segment."""
    segments, latents = len(packed.cu_seqlens) - 1, pool.latent_len
    query = pool.q(pool.latent[0]).view(latents, pool.num_heads, pool.head_dim)
    key, value = pool.kv(tokens).view(-1, 2, pool.num_heads, pool.head_dim).unbind(1)
    query, key = pool.q_norm(query), pool.k_norm(key).to(value.dtype)
    starts_q = torch.arange(0, (segments + 1) * latents, latents, dtype=torch.int32, device=tokens.device)
    query = query.expand(segments, -1, -1, -1).flatten(0, 1).to(value.dtype)
    lengths = (starts_q, packed.cu_seqlens, latents, packed.max_seqlen)
    x = ops.varlen_attention(query, key, value, *lengths, pool.scale, skip_keys=skip)
    x = pool.proj_drop(pool.proj(x.flatten(1)))
    if pool.mlp is not None:
        x = x + pool.mlp(pool.norm(x))
    pooled: Tensor = x[::latents]
    return pooled
