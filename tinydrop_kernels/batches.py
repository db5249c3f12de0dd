"""Batches of images, with labels or without, from any loader."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def labelled_batches(loader: Iterable[Any], classes: int) -> Iterator[tuple[Tensor, NDArray[np.int32] | None]]:
    """Yield the images and labels of each batch, and check the labels. Labels are None if the loader has none.

    Args:
        loader: batches of images, or batches ``(images, labels)``. Images are floating ``(n, ...)`` and labels are
            integers ``(n,)``.
        classes: the number of classes. Labels must be below it.

    Raises:
        TypeError: a batch is something else, or its images are not floating.
        ValueError: labels have the wrong shape or dtype, are out of range, or are missing in some batches.
    """
    labelled = None
    for batch in loader:
        if isinstance(batch, Tensor):
            images, labels = batch, None
        elif isinstance(batch, list | tuple) and len(batch) >= 2 and isinstance(batch[0], Tensor):
            images, labels = batch[:2]
        else:
            raise TypeError(f"loader: got a batch of {type(batch).__name__}, expected images, or (images, labels)")
        if not images.is_floating_point():
            raise TypeError(f"loader: got images in {images.dtype}, expected floating ones, normalised for the model")
        if labelled not in (None, labels is not None):
            raise ValueError("loader: got batches with labels and batches without, expected one kind")
        labelled = labels is not None
        yield images, None if labels is None else _checked(labels, len(images), classes)


def _checked(labels: Any, images: int, classes: int) -> NDArray[np.int32]:
    found = torch.as_tensor(labels).numpy(force=True)
    if found.shape != (images,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"loader: got labels {found.dtype} {found.shape}, expected whole numbers ({images},)")
    if images and (found.min() < 0 or found.max() >= classes):
        raise ValueError(f"loader: got labels {found.min()} to {found.max()}, expected 0 to {classes - 1}")
    return found.astype(np.int32)
