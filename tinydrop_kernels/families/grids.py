"""Images and position embeddings at a coarser grid. The patch size stays, so the image gets smaller."""

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from tinydrop_kernels.ops.derived import derived
from tinydrop_kernels.ops.types import LEVELS, Grid


def coarser_grids(dense: Grid) -> list[Grid]:
    """Return the dense grid and the coarser grids of :data:`LEVELS`.

    Levels of a small grid that round to the same size are listed once.
    """
    rows, columns = dense
    grids = [(max(1, int(rows * side + 0.5)), max(1, int(columns * side + 0.5))) for side in LEVELS]
    return list(dict.fromkeys(grids))


def resized_images(images: Tensor, patch: tuple[int, int], dense: Grid, grid: Grid) -> Tensor:
    """Resize images so that their patches form another grid.

    The interpolation is bicubic with antialiasing. It runs in float32, because torch has no antialiasing in half
    precision on CPU.

    Args:
        images: floating ``(n, channels, height, width)``. Pixels beyond the last whole patch are left out.
        patch: height and width of a patch in pixels.
        dense: rows and columns of the images' own grid.
        grid: rows and columns of the new grid.

    Returns:
        ``(n, channels, grid[0] * patch[0], grid[1] * patch[1])``.
    """
    whole = images[..., : dense[0] * patch[0], : dense[1] * patch[1]].float()
    size = (grid[0] * patch[0], grid[1] * patch[1])
    return F.interpolate(whole, size=size, mode="bicubic", align_corners=False, antialias=True).to(images.dtype)


def resampled_positions(pos_embed: Tensor, old: Grid, new: Grid, num_prefix_tokens: int) -> Tensor:
    """Resample position embeddings to another grid.

    timm's ``resample_abs_pos_embed`` does it, as in a ViT with ``dynamic_img_size``.

    Args:
        pos_embed: ``(1, num_prefix_tokens + old patches, dim)``.
        old, new: rows and columns of the grids.
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
