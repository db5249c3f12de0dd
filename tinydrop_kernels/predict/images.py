"""Loading of images from files, bytes and arrays, and their preprocessing for timm models."""

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from tinydrop_kernels.normalization import normalization_of
from tinydrop_kernels.ops.types import TimmModule

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
MODES = {1: "L", 3: "RGB"}  # Pillow's mode for each number of channels


def load_image(source: ImageSource, channels: int = 3) -> Image.Image:
    """Return an upright 8-bit image from a path, bytes, a PIL image or an array.

    * The image is rotated as its EXIF orientation says.
    * 16-bit pixels are scaled to 8 bits, so that 65535 becomes 255.
    * Floating-point pixels are scaled from [0, 1] to [0, 255]. Values outside [0, 1] are refused, because their range
      is unknown. Stretching each image to its own range would change the model's input.
    * Transparency is dropped, as in torchvision's loaders. Of an animation, the first frame is taken.

    Args:
        source: a path, an encoded file's bytes, a PIL image, or an array ``(height, width)``, ``(height, width, 1)`` or
            ``(height, width, 3)`` of uint8, uint16 or floating-point values.
        channels: 3 for colour, 1 for grey.

    Raises:
        TypeError: the source has another type.
        ValueError: an array has another shape or dtype, or pixels are out of range.
        OSError: the file does not exist, or Pillow cannot read it as an image.

    Example:
        >>> import numpy as np
        >>> image = tdk.predict.images.load_image(np.zeros((48, 64, 3), dtype=np.uint8))
        >>> image.size, image.mode  # Pillow's size is (width, height)
        ((64, 48), 'RGB')
        >>> tdk.predict.images.load_image("photo.jpg").mode  # doctest: +SKIP
        'RGB'
    """
    if isinstance(source, np.ndarray):
        return _from_array(source).convert(MODES[channels])
    if isinstance(source, Image.Image):
        return _converted(source, channels)
    if isinstance(source, bytes | bytearray | memoryview):
        file: io.BytesIO | str | os.PathLike[str] = io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        file = source
    else:
        raise TypeError(f"image: got {type(source).__name__}, expected a path, bytes, a PIL image or a NumPy array")
    with Image.open(file) as image:
        return _converted(image, channels)


def _converted(image: Image.Image, channels: int) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # convert() alone would clip these modes at 255
        image = Image.fromarray(_as_uint8(np.asarray(image)))
    return image.convert(MODES[channels])


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in MODES):
        raise ValueError(f"image: got shape {array.shape}, expected (height, width), optionally with 1 or 3 channels")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(_as_uint8(array))


def _as_uint8(pixels: np.ndarray) -> np.ndarray:
    """Return pixels of another dtype scaled to uint8, in the same shape."""
    if not pixels.size:
        raise ValueError("image: got no pixels")
    if pixels.dtype == np.uint8:
        return pixels
    if np.issubdtype(pixels.dtype, np.floating):
        highest: float = 1
    elif pixels.dtype.newbyteorder("=") in (np.uint16, np.int32):  # Pillow holds 16-bit pixels in either
        highest = 65535
    else:
        raise ValueError(f"image: got pixels of {pixels.dtype}, expected uint8, uint16 or floating-point")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= highest):  # written so that NaN is refused too
        raise ValueError(f"image: got {pixels.dtype} pixels from {low:g} to {high:g}, expected 0 to {highest}")
    return (pixels.astype(np.float32) * (255 / highest)).round().astype(np.uint8)


def image_transform(model: TimmModule) -> Callable[[Image.Image], Tensor]:
    """Return timm's own preprocessing for a model, at the model's current input size and normalisation.

    Returns:
        A function from a PIL image to a float32 tensor ``(channels, height, width)``.

    Raises:
        ValueError: the model takes neither one channel nor three.

    Example:
        >>> from PIL import Image
        >>> transform = tdk.predict.images.image_transform(model)
        >>> transform(Image.new("RGB", (640, 480))).shape
        torch.Size([3, 224, 224])
    """
    config = resolve_model_data_config(model)
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels not in MODES:
        raise ValueError(f"model: it takes images of {channels} channels, expected 1 (grey) or 3 (colour)")
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    config["input_size"] = (channels, *size)
    config["mean"], config["std"] = normalization_of(model, channels)
    transform: Callable[[Image.Image], Tensor] = create_transform(**config)
    return transform


def image_files(paths: Iterable[Path], on_skip: Callable[[Path, str], None]) -> list[Path]:
    """Return the given files, and all image files in the given folders.

    The files of each folder are sorted.

    Args:
        paths: files and folders. Files are returned as they are. Folders are searched, with their subfolders, for file
            name endings that Pillow can open. Links to folders are followed.
        on_skip: called with a path and the reason for each path that is skipped. These are unreadable folders, links
            back to a folder that was searched before, and image names that are not regular files.

    Example:
        >>> from pathlib import Path
        >>> paths = tdk.predict.images.image_files([Path("photos")], on_skip=print)  # doctest: +SKIP
        >>> [path.name for path in paths]  # doctest: +SKIP
        ['bee.jpg', 'wasp.png']
    """
    Image.init()
    endings = {ending for ending, name in Image.EXTENSION.items() if name in Image.OPEN}
    found: list[Path] = []
    for path in paths:
        found += sorted(_files_below(path, endings, on_skip)) if path.is_dir() else [path]
    return found


def _files_below(folder: Path, endings: set[str], on_skip: Callable[[Path, str], None]) -> Iterable[Path]:
    def unreadable(error: OSError) -> None:
        on_skip(Path(error.filename), error.strerror or str(error))

    seen: dict[tuple[int, int], str] = {}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        first = seen.setdefault((status.st_dev, status.st_ino), parent)
        if first != parent:
            on_skip(Path(parent), f"the same folder as {first}")
            folders.clear()
            continue
        for path in (Path(parent, name) for name in files):
            if path.suffix.lower() in endings:
                if path.is_file():
                    yield path
                else:
                    on_skip(path, "not a regular file")
