"""Pictures of the kept patches and of the saliency that selected them."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tinydrop_kernels.normalization import normalization_of
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.report import Call

Picture: TypeAlias = Image.Image | np.ndarray

DROPPED_BRIGHTNESS = 0.15
LINE_OPACITY = 70  # of 255
FRAME = (230, 120, 20)
HOT = np.array((255, 60, 0), dtype=np.float32)
GAP = 8


def as_pictures(model: TimmModule, images: Tensor) -> list[Image.Image]:
    """Return a batch of normalised images as 8-bit pictures.

    The pictures show the model's input: they are resized and cropped as it was.

    Args:
        model: the timm model whose normalisation is undone.
        images: floating ``(batch, channels, height, width)``.

    Example:
        >>> pictures = tdk.visualize.as_pictures(model, images)
        >>> len(pictures), pictures[0].size, pictures[0].mode
        (2, (224, 224), 'RGB')
    """
    channels = images.shape[1]
    mean, std = (torch.tensor(own, device=images.device)[:, None, None] for own in normalization_of(model, channels))
    pixels = ((images.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [_rgb(image[..., 0] if channels == 1 else image) for image in pixels]


def kept_patches(image: Picture, call: Call, index: int) -> Image.Image:
    """Return a picture of the patches that went through the target. Dropped patches are dark.

    An image that exited gets an orange frame, because the target did not see it.

    Args:
        image: the image, resized and cropped as for the model (:func:`as_pictures` returns this). It is a PIL image or
            a uint8 array ``(height, width)`` or ``(height, width, 3)``, of any size.
        call: the record of the model's call on the batch, ``model.tinydrop.last``.
        index: the image's position in the batch.

    Example:
        >>> tdk.patch(model, guidance)(images).shape
        torch.Size([2, 10])
        >>> picture = tdk.visualize.as_pictures(model, images)[0]
        >>> tdk.visualize.kept_patches(picture, model.tinydrop.last, 0).size
        (224, 224)
        >>> tdk.visualize.kept_patches(picture, model.tinydrop.last, 0).save("kept.png")  # doctest: +SKIP
    """
    picture = _rgb(image)
    if call.exited[index]:
        ImageDraw.Draw(picture).rectangle(
            (0, 0, picture.width - 1, picture.height - 1), outline=FRAME, width=_frame(picture)
        )
        return picture
    rows, columns = call.grid_sizes[index]
    kept = np.zeros(rows * columns, dtype=np.uint8)
    kept[call.kept[index].long().cpu().numpy()] = 255
    mask = Image.fromarray(kept.reshape(rows, columns)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, picture.point(lambda value: int(value * DROPPED_BRIGHTNESS)), mask)


def saliency(image: Picture, call: Call, index: int) -> Image.Image:
    """Return the image in grey with its saliency in red. A redder place is more salient.

    The arguments are those of :func:`kept_patches`.

    Example:
        >>> answers = tdk.patch(model, guidance)(images)
        >>> picture = tdk.visualize.as_pictures(model, images)[1]
        >>> tdk.visualize.saliency(picture, model.tinydrop.last, 1).size
        (224, 224)
    """
    picture = _rgb(image)
    values = torch.nan_to_num(call.saliency[index].float(), posinf=0, neginf=0).cpu().numpy()
    values = values - values.min()
    values = values / (values.max() or 1)
    heat = Image.fromarray(np.uint8(255 * values)).resize(picture.size, Image.Resampling.BILINEAR)
    share = np.asarray(heat, dtype=np.float32)[..., None] / 255
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray(np.uint8(grey * (1 - share) + HOT * share))


def on_own_grid(image: Picture, call: Call, index: int) -> Image.Image:
    """Return a picture like that of :func:`kept_patches`, at the resolution of the image's own grid.

    Lines separate the patches. The arguments are those of :func:`kept_patches`.
    """
    picture = _rgb(image)
    if call.exited[index]:
        return kept_patches(picture, call, index)
    (rows, columns), (dense_rows, dense_columns) = call.grid_sizes[index], call.levels[0]
    width, height = picture.size
    if (rows, columns) != (dense_rows, dense_columns):
        coarse = max(1, width * columns // dense_columns), max(1, height * rows // dense_rows)
        picture = picture.resize(coarse, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.NEAREST)
    picture = kept_patches(picture, call, index)
    lines = Image.new("L", picture.size)
    draw = ImageDraw.Draw(lines)
    for i in range(1, columns):
        draw.line([(i * width // columns, 0), (i * width // columns, height)], LINE_OPACITY)
    for i in range(1, rows):
        draw.line([(0, i * height // rows), (width, i * height // rows)], LINE_OPACITY)
    picture.paste("white", mask=lines)
    return picture


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return one picture that shows several pictures of the same size in a row."""
    width, height = pictures[0].size
    page = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (i * (width + GAP), 0))
    return page


def _frame(picture: Image.Image) -> int:
    return max(1, min(picture.size) // 40)


def _rgb(image: Picture) -> Image.Image:
    """Return a copy in RGB."""
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else image.copy()).convert("RGB")
