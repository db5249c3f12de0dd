"""timm's attention and its last block on packed tokens.

If the head reads only prefix tokens, the last block computes keys and values for all tokens, but queries, projection
and MLP only for the prefix tokens. The result is exact and saves 7 % of a 12-layer ViT.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.ops.onednn import linear
from tinydrop_kernels.ops.types import Packed, TimmModule
from tinydrop_kernels.torch_internals import has_hooks


def project_fused(attention: TimmModule, x: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value, each ``(total, heads, head_dim)``, as BEiT, EVA and SwinV2 project them.

    These models have learned biases for query and value only.

    Args:
        attention: an attention with ``qkv`` and ``num_heads``. ``q_bias``, ``k_bias`` and ``v_bias`` may be None.
        x: ``(total, dim)``.
    """
    if attention.q_bias is None:
        projected = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        if attention.qkv_bias_separate or type(attention.qkv) is not nn.Linear:
            projected = attention.qkv(x) + bias
        else:
            projected = linear(x, attention.qkv.weight, bias)
    heads: tuple[Tensor, ...] = projected.view(len(x), 3, attention.num_heads, -1).unbind(1)
    return heads


def reads_prefix_alone(block: TimmModule) -> bool:
    """Return whether :func:`run_last_block` can replace the block: it is timm's plain ``Block``, without hooks."""
    if type(block) is not Block or type(block.attn.qkv) is not nn.Linear:
        return False
    return not any(map(has_hooks, block.modules()))


def run_last_block(block: TimmModule, tokens: Tensor, packed: Packed, num_prefix_tokens: int) -> tuple[Tensor, Packed]:
    """Run a block for the prefix tokens alone.

    Args:
        block: a block for which :func:`reads_prefix_alone` is true.
        tokens: ``(total, dim)``.
        packed: layout of the tokens, without empty segments.
        num_prefix_tokens: prefix tokens per segment, at least 1.

    Returns:
        The prefix tokens ``(segments * num_prefix_tokens, dim)``, and their layout.
    """
    attention, segments = block.attn, len(packed.cu_seqlens) - 1
    starts = torch.arange(segments + 1, dtype=torch.int32, device=tokens.device) * num_prefix_tokens
    prefix = Packed(starts, num_prefix_tokens, segments * num_prefix_tokens)
    rows = packed.cu_seqlens[:-1, None] + torch.arange(num_prefix_tokens, device=tokens.device)

    normed = block.norm1(tokens)
    x, read = tokens[rows.flatten()], normed[rows.flatten()]
    weight, bias, dim = attention.qkv.weight, attention.qkv.bias, attention.attn_dim
    query = linear(read, weight[:dim], None if bias is None else bias[:dim])
    both = linear(normed, weight[dim:], None if bias is None else bias[dim:])
    query = query.view(-1, attention.num_heads, attention.head_dim)
    key, value = both.view(-1, 2, attention.num_heads, attention.head_dim).unbind(1)
    x = x + block.drop_path1(block.ls1(attend_projected(attention, read, query, key, value, prefix, packed)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), prefix


def attend_projected(
    attention: TimmModule,
    x: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Packed,
    keys: Packed,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the output ``(rows, dim)`` of a timm attention whose queries, keys and values are already projected.

    Args:
        attention: an attention with ``q_norm``, ``k_norm``, ``norm``, ``proj``, ``proj_drop`` and maybe a ``gate``.
        x: ``(rows, dim)``, the tokens that the queries were projected from.
        query: ``(rows, heads, head_dim)``.
        key, value: ``(total, heads, head_dim)``. With fewer heads than the query, each serves a group of query heads.
        queries, keys: layouts of the queries and of the keys.
        turn: rotates normed queries and keys; None if the model has no rotary embedding.
    """
    query, key = attention.q_norm(query), attention.k_norm(key)
    if turn is not None:
        query, key = turn(query), turn(key)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms return float32
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    lengths = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
    out = attention.norm(ops.varlen_attention(query, key, value, *lengths, attention.scale).flatten(1))
    gate = getattr(attention, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(out))
    return projected


def linears(model: TimmModule) -> list[nn.Linear]:
    """Return the linear layers of the blocks whose class and forward are torch's own."""
    blocks = model.blocks if hasattr(model, "blocks") else model.layers
    return [module for module in blocks.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
