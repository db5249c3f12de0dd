"""Images and positions at a coarser grid: the patch size stays, the image gets smaller."""

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import LEVELS, Grid


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
