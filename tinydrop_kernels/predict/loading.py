"""From files, bytes and arrays to batches of tensors. Images that cannot be read are set aside and reported."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.predict.images import ImageSource, image_transform, load_image


class LoadedBatch(NamedTuple):
    """The readable images of a batch, at least one."""

    images: Tensor  # float32 (batch, channels, height, width), normalised for the model
    indices: list[int]  # places among the inputs
    names: list[str]


class ImageLoader:
    """Loads images for a model, batch by batch.

    Args:
        model: a timm model; its own preprocessing is used.
        batch_size: inputs of a batch; it has fewer images if some of them cannot be read.
        workers: processes that load images; 0 loads them in this one.
        on_unreadable: called with the name and the reason for each image that cannot be read.
        progress: show a progress bar, if standard error is a terminal.
        pin_memory: put batches into pinned memory, from which a GPU copies them in the background.

    Raises:
        ValueError: the model takes neither one channel nor three.
    """

    def __init__(
        self,
        model: TimmModule,
        batch_size: int,
        workers: int,
        on_unreadable: Callable[[str, str], None],
        progress: bool = False,
        pin_memory: bool = False,
    ):
        self.batch_size, self.workers, self.on_unreadable = batch_size, workers, on_unreadable
        self.progress, self.pin_memory = progress, pin_memory
        self._images = _Images(image_transform(model), getattr(model, "in_chans", 3))

    def __call__(self, inputs: Iterable[ImageSource], workers: int | None = None) -> Iterator[LoadedBatch]:
        """Load the inputs in order; they are taken as they are needed.

        Args:
            inputs: see :func:`images.load_image`.
            workers: in place of the loader's own number.
        """
        loader = DataLoader(
            self._images,
            batch_size=self.batch_size,
            sampler=enumerate(inputs),  # the inputs themselves and not their numbers, so that they may be a stream
            num_workers=self.workers if workers is None else workers,
            collate_fn=list,
            pin_memory=self.pin_memory,
        )
        total = len(inputs) if isinstance(inputs, Sized) else None
        with tqdm(total=total, unit="image", disable=None if self.progress else True) as bar:
            for loaded in loader:
                for _, name, reason in loaded:
                    if isinstance(reason, str):
                        self.on_unreadable(name, reason)
                readable = [(index, name, image) for index, name, image in loaded if isinstance(image, Tensor)]
                if readable:
                    indices, names, images = zip(*readable, strict=True)
                    yield LoadedBatch(torch.stack(images), list(indices), list(names))
                bar.update(len(loaded))


class _Images(Dataset[Any]):
    """Loads the input that comes with its number. In place of an image that cannot be read stands the reason."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], channels: int):
        self.transform = transform
        self.channels = channels

    def __getitem__(self, numbered: tuple[int, ImageSource]) -> tuple[int, str, Tensor | str]:
        index, source = numbered
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "filename", "")
        name = str(name) or f"#{index}"
        try:
            return index, name, self.transform(load_image(source, self.channels))
        except Exception as error:  # Pillow's decoders raise errors of many types
            return index, name, str(error) or type(error).__name__


def folder_labels(data: Path, files: Sequence[Path], class_names: Sequence[str]) -> list[int] | None:
    """Return the class of each file, from the folder it is in.

    Folders are matched with classes by name. If no name is known, they are matched in order, provided that there are
    as many folders as classes.

    Args:
        data: the folder of the class folders.
        files: files in them.
        class_names: names of the model's classes, in their order.

    Returns:
        Indices of classes; None if the folders do not fit the classes.
    """
    folders = [file.relative_to(data).parts[0] if file.parent != data else "" for file in files]
    names = sorted(set(folders) - {""})
    if "" in folders or not names:
        return None
    if set(names) <= set(class_names):
        numbers = {name: class_names.index(name) for name in names}
    elif len(names) == len(class_names):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        return None
    return [numbers[folder] for folder in folders]
