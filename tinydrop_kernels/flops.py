"""What a call cost in FLOPs, and what the dense call would have cost.

Counted as ``torch.utils.flop_counter`` does: two per multiply-add of matrix products, convolutions and attention;
everything else is free. The target is counted by formula, because a packed call costs differently for every batch;
``tests/test_flops.py`` holds the formula against the counter, dense and packed.
"""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinydrop_kernels.aliases import TimmModule
from tinydrop_kernels.families import vit
from tinydrop_kernels.guidance import Guidance


def guidance_flops(guidance: Guidance) -> int:
    """FLOPs of the guidance model on one image."""
    return _counted(guidance.model, (guidance.in_chans, *guidance.input_size))


def target_flops(model: TimmModule, kept: list[int], grid_size: tuple[int, int], summary: bool) -> int:
    """FLOPs of a VisionTransformer on images of which so many patches are kept.

    Args:
        model: a supported timm model, patched or not.
        kept: kept patches of each image, 0 for one that exits; ``[rows * columns] * batch`` gives the dense cost.
        grid_size: rows and columns of patches.
        summary: whether a summary token joins the images that lost patches.
    """
    rows, columns = grid_size
    num_patches = rows * columns
    per_token = sum(_linear(m) for m in model.blocks.modules())
    attention = sum(4 * block.attn.attn_dim for block in model.blocks)
    per_image = _linear(model.head) + _linear(getattr(model, "head_dist", None))
    pool = model.attn_pool
    total = 0
    for patches in filter(None, kept):
        summaries = int(summary and patches < num_patches)
        tokens = model.num_prefix_tokens + patches + summaries
        total += tokens * per_token + tokens**2 * attention + per_image
        if pool is not None:
            pooled = tokens if model.pool_include_prefix else tokens - model.num_prefix_tokens
            once = sum(_linear(m) for name, m in pool.named_modules() if name != "kv") * pool.latent_len
            total += pooled * (_linear(pool.kv) + 4 * pool.latent_len * pool.num_heads * pool.head_dim) + once
        if vit.embeds_kept_only(model):
            total += (patches + summaries) * 2 * model.patch_embed.proj.weight.numel()
    if not vit.embeds_kept_only(model) and any(kept):  # the whole batch goes through the stem
        patch_height, patch_width = model.patch_embed.feat_ratio(as_scalar=False)
        total += len(kept) * _counted(model.patch_embed, (model.in_chans, rows * patch_height, columns * patch_width))
    return total


def _linear(module: nn.Module | None) -> int:
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0


def _counted(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOPs of a module on one image, counted on meta tensors: nothing is computed."""
    module = copy.deepcopy(module).to("meta")
    image = torch.empty(1, *image_shape, device="meta", dtype=next(module.parameters()).dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    return counter.get_total_flops()
