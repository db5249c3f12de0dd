"""Token merging (ToMe) for timm's Vision Transformers, as in Bolya et al. 2023, arXiv 2210.09461.

Between attention and MLP of every block, r patches are merged into the patches with the most similar keys (bipartite
soft matching). A token's size is the number of patches in it. Means are weighted by size, and the logarithm of the size
is added to attention's scores (proportional attention). Prefix tokens are not merged.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinydrop_kernels.families.flops import linear_flops


def merge(tokens: Tensor, sizes: Tensor, keys: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge r tokens of each image into others.

    Every second token is a source, with an edge to the most similar of the remaining tokens. The r sources with the
    best edges are merged.

    Args:
        tokens: ``(batch, n, dim)``.
        sizes: float32 ``(batch, n, 1)``.
        keys: ``(batch, n, head_dim)``. The similarity is the cosine of two keys.
        r: number of merged tokens, at most ``n // 2``.

    Returns:
        Tokens ``(batch, n - r, dim)`` and their sizes. Sources that were not merged come first.
    """
    batch, _, dim = tokens.shape
    keys = F.normalize(keys, dim=-1)
    similarity, nearest = (keys[:, ::2] @ keys[:, 1::2].mT).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True)
    gone, stay = order[:, :r], order[:, r:]
    into = nearest.gather(1, gone)

    def taken(x: Tensor, places: Tensor) -> Tensor:
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))

    sources, targets = tokens[:, ::2], tokens[:, 1::2]
    source_sizes, target_sizes = sizes[:, ::2], sizes[:, 1::2]
    count = targets.shape[1]
    rows = (into + count * torch.arange(batch, device=into.device)[:, None]).flatten()
    weighted = (taken(sources, gone) * taken(source_sizes, gone)).to(tokens.dtype)
    sums = (targets * target_sizes).to(tokens.dtype).flatten(0, 1).index_add(0, rows, weighted.flatten(0, 1))
    new_sizes = target_sizes.flatten(0, 1).index_add(0, rows, taken(source_sizes, gone).flatten(0, 1))
    new_sizes = new_sizes.view(batch, count, 1)
    targets = (sums.view(batch, count, dim) / new_sizes).to(tokens.dtype)
    return torch.cat((taken(sources, stay), targets), dim=1), torch.cat((taken(source_sizes, stay), new_sizes), dim=1)


def merged_by_layer(patches: int, depth: int, total: int) -> list[int]:
    """Return the number of patches merged in each layer.

    The total is spread evenly over the layers. A layer merges at most half of its patches.
    """
    merged = []
    for layer in range(depth):
        merged.append(min((layer + 1) * total // depth - layer * total // depth, patches // 2))
        patches -= merged[-1]
    return merged


class TokenMerging:
    """A callable that runs a timm ``VisionTransformer`` with token merging. The model is not changed.

    Args:
        model: a model with plain blocks, not patched.
        total: number of patches merged in all layers together. In the paper, this is r times the number of layers.

    Attributes:
        tokens: number of tokens per image after each layer of the last call, prefix included.
    """

    def __init__(self, model: Any, total: int):
        self.model, self.tokens = model, list[int]()
        self.merged = merged_by_layer(model.patch_embed.num_patches, len(model.blocks), total)

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits ``(batch, classes)``."""
        model, prefix = self.model, self.model.num_prefix_tokens
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        sizes, self.tokens = None, []
        for block, r in zip(model.blocks, self.merged, strict=True):
            x, keys = _attend(block, x, sizes)
            if r:
                sizes = x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if sizes is None else sizes
                patches, of_patches = merge(x[:, prefix:], sizes[:, prefix:], keys[:, prefix:], r)
                x = torch.cat((x[:, :prefix], patches), dim=1)
                sizes = torch.cat((sizes[:, :prefix], of_patches), dim=1)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            self.tokens.append(x.shape[1])
        return model.forward_head(model.norm(x))


def _attend(block: Any, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output of a block's attention, and the keys' mean over the heads ``(batch, tokens, head_dim)``."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = attention.q_norm(query), attention.k_norm(key)
    bias = None if sizes is None else sizes.log().to(query.dtype)[:, None].mT
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=attention.scale)
    out = attention.proj(attention.norm(out.transpose(1, 2).flatten(2)))
    return x + block.ls1(out), key.mean(dim=1)


def flops(model: Any, total: int) -> int:
    """Return the FLOPs per image, matching included. ``total`` is that of :class:`TokenMerging`."""
    patches, prefix, found = model.patch_embed.num_patches, model.num_prefix_tokens, linear_flops(model.head)
    found += patches * 2 * model.patch_embed.proj.weight.numel()
    for block, merged in zip(model.blocks, merged_by_layer(patches, len(model.blocks), total), strict=True):
        tokens, attention = prefix + patches, block.attn
        found += tokens * (linear_flops(attention.qkv) + linear_flops(attention.proj))
        found += 4 * tokens**2 * attention.attn_dim
        found += 2 * math.ceil(patches / 2) * (patches // 2) * attention.head_dim if merged else 0
        patches -= merged
        found += (prefix + patches) * (linear_flops(block.mlp.fc1) + linear_flops(block.mlp.fc2))
    return found


def total_for(model: Any, aim: float) -> int:
    """Return the number of merged patches whose FLOPs per image are closest to ``aim``."""
    most = len(model.blocks) * model.patch_embed.num_patches // 2
    return min(range(most + 1), key=lambda total: abs(flops(model, total) - aim))
