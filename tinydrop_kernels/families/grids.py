"""Images and positions at a coarser grid: the patch size stays, the image gets smaller."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tinydrop_kernels.ops.types import LEVELS, Grid

_derived: Any = WeakIdKeyDictionary()  # first weight -> {key: (their state then, what was made of them)}


def coarser_grids(dense: Grid) -> list[Grid]:
    """The dense grid and the coarser ones, each once: of a small grid some round to the same."""
    rows, columns = dense
    grids = [(max(1, int(rows * side + 0.5)), max(1, int(columns * side + 0.5))) for side in LEVELS]
    return list(dict.fromkeys(grids))


def resized_images(images: Tensor, patch: tuple[int, int], dense: Grid, grid: Grid) -> Tensor:
    """Images whose whole patches make another grid: bicubic, antialiased, in float32 (CPU has no other).

    Args:
        images: floating ``(n, channels, height, width)``, of the grid ``dense``; pixels beyond it are left out.
        patch: height and width.
        dense, grid: rows and columns.

    Returns:
        ``(n, channels, grid[0] * patch[0], grid[1] * patch[1])``.
    """
    whole = images[..., : dense[0] * patch[0], : dense[1] * patch[1]].float()
    size = (grid[0] * patch[0], grid[1] * patch[1])
    return F.interpolate(whole, size=size, mode="bicubic", align_corners=False, antialias=True).to(images.dtype)


def resampled_positions(pos_embed: Tensor, old: Grid, new: Grid, num_prefix_tokens: int) -> Tensor:
    """timm's ``resample_abs_pos_embed``, which a ViT with ``dynamic_img_size`` uses too.

    Args:
        pos_embed: ``(1, num_prefix_tokens + old patches, dim)``.
        old, new: rows and columns.
        num_prefix_tokens: rows in front that are not resampled.

    Returns:
        ``(1, num_prefix_tokens + new patches, dim)``.
    """
    if new == old:
        return pos_embed

    def resample() -> Tensor:
        resampled: Tensor = resample_abs_pos_embed(
            pos_embed, new_size=list(new), old_size=list(old), num_prefix_tokens=num_prefix_tokens
        )
        return resampled

    return derived(pos_embed, (old, new), resample)


def derived(weights: Tensor | tuple[Tensor, ...], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` computes from weights alone; kept until one of them changes, unless a gradient is to reach them.

    Args:
        weights: parameters or buffers, or one.
        key: tells apart what is made of the same weights.
        make: called where nothing is kept.
    """
    weights = (weights,) if isinstance(weights, Tensor) else weights
    wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    if wanted or torch.compiler.is_compiling() or any(weight.is_inference() for weight in weights):
        return make()
    state = [(weight._version, weight.data_ptr(), weight.dtype, weight.device) for weight in weights]
    kept = _derived.setdefault(weights[0], {})
    if kept.get(key, (None,))[0] != state:
        with torch.inference_mode(False), torch.no_grad():
            kept[key] = (state, make())
    made: Tensor = kept[key][1]
    return made
