"""What a call cost in FLOPs, and what the dense call would have cost.

Counted as ``torch.utils.flop_counter`` does: two per multiply-add of matrix products, convolutions and attention;
everything else is free. The target is counted by formula, because a packed call costs differently for every batch;
``tests/test_flops.py`` holds the formula against the counter, dense and packed.
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinydrop_kernels.guidance import Guidance


def guidance_flops(guidance: Guidance) -> int:
    """FLOPs of the guidance model on one image: counted on meta tensors, nothing is computed."""
    model = copy.deepcopy(guidance.model).to("meta")
    weights = next(model.parameters())
    image = torch.empty(1, guidance.in_chans, *guidance.input_size, device="meta", dtype=weights.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def target_flops(model: nn.Module, patches: list[int], num_patches: int, summary: bool) -> int:
    """FLOPs of a VisionTransformer on images of which so many patches are kept; 0 kept costs nothing.

    Args:
        model: a supported timm model, patched or not.
        patches: kept patches of each image.
        num_patches: patches of a whole image; ``[num_patches] * batch`` gives the dense cost.
        summary: whether a summary token joins the images that lost patches.
    """
    per_token = sum(_linear(m) for m in model.blocks.modules())
    attention = sum(4 * block.attn.attn_dim for block in model.blocks)
    projection = model.patch_embed.proj
    per_patch = 2 * projection.weight.numel()
    per_image = sum(_linear(m) for name in ("head", "head_dist") for m in [getattr(model, name, None)])
    pool = model.attn_pool
    total = 0
    for kept in filter(None, patches):
        summarised = int(summary and kept < num_patches)
        tokens = kept + summarised + model.num_prefix_tokens
        pooled = tokens if model.pool_include_prefix else tokens - model.num_prefix_tokens
        total += (kept + summarised) * per_patch + tokens * per_token + tokens**2 * attention + per_image
        if pool is not None:
            once = sum(_linear(m) for name, m in pool.named_modules() if name != "kv") * pool.latent_len
            total += pooled * (_linear(pool.kv) + 4 * pool.latent_len * pool.num_heads * pool.head_dim) + once
    return total


def _linear(module: nn.Module | None) -> int:
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
