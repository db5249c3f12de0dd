"""Loading of files, bytes and arrays as batches of tensors. Unreadable images are skipped and reported."""

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
    indices: list[int]  # positions among the inputs
    names: list[str]


class ImageLoader:
    """A loader of images for a model, batch by batch.

    Args:
        model: a timm model; its own preprocessing is used.
        batch_size: inputs per batch. A batch has fewer images if some of its inputs cannot be read.
        workers: processes that load images. With 0, images are loaded in the calling process.
        on_unreadable: called with the name and the reason for each image that cannot be read.
        progress: show a progress bar if standard error is a terminal.
        pin_memory: put batches into pinned memory, so that a GPU can copy them in the background.

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
        """Load the inputs in order and yield batches. Inputs may be a stream, because they are consumed lazily.

        Args:
            inputs: images in the forms that :func:`images.load_image` takes.
            workers: number of processes, in place of the loader's own.
        """
        loader = DataLoader(
            self._images,
            batch_size=self.batch_size,
            sampler=enumerate(inputs),  # yields inputs in place of indices, because a stream has no indices
            num_workers=self.workers if workers is None else workers,
            collate_fn=_collate,
            pin_memory=self.pin_memory,
        )
        total = len(inputs) if isinstance(inputs, Sized) else None
        with tqdm(total=total, unit="image", disable=None if self.progress else True) as bar:
            for batch, unreadable in loader:
                for name, reason in unreadable:
                    self.on_unreadable(name, reason)
                if batch is not None:
                    yield batch
                bar.update((0 if batch is None else len(batch.names)) + len(unreadable))


class _Images(Dataset[Any]):
    """A data set that is indexed by (number, input) pairs. An unreadable image is replaced by the reason."""

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


def _collate(
    loaded: list[tuple[int, str, Tensor | str]],
) -> tuple[LoadedBatch | None, list[tuple[str, str]]]:
    """Return the readable images as one batch, None if there is none, and name and reason of each unreadable image.

    It runs in the process that loads, before the batch is pinned: memory that is joined later would not be pinned.
    """
    unreadable = [(name, reason) for _, name, reason in loaded if isinstance(reason, str)]
    readable = [(index, name, image) for index, name, image in loaded if isinstance(image, Tensor)]
    if not readable:
        return None, unreadable
    indices, names, images = zip(*readable, strict=True)
    return LoadedBatch(torch.stack(images), list(indices), list(names)), unreadable


class FolderBatches:
    """Batches of the readable images, with labels if the classes are known. ``read`` collects the images' names."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int] | None, loader: ImageLoader):
        self.files, self.labels, self.loader, self.read = files, labels, loader, list[str]()

    def __len__(self) -> int:
        return -(-len(self.files) // self.loader.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for images, indices, names in self.loader(self.files):
            self.read += names
            yield images if self.labels is None else (images, torch.tensor([self.labels[index] for index in indices]))


def folder_labels(data: Path, files: Sequence[Path], class_names: Sequence[str]) -> list[int] | None:
    """Return the class of each file, taken from the name of its folder.

    If every folder has the name of a class, folders are matched by name. If no folder has, the sorted folders are
    matched with the classes in order, provided that there are as many folders as classes.

    Args:
        data: the folder that contains the class folders.
        files: files in the class folders.
        class_names: names of the model's classes, in their order.

    Returns:
        Class indices; None if the folders do not match the classes, or a folder's name is that of several classes.
    """
    folders = [file.relative_to(data).parts[0] if file.parent != data else "" for file in files]
    names = sorted(set(folders) - {""})
    if "" in folders or not names:
        return None
    named = [list(class_names).count(name) for name in names]
    if set(named) == {1}:
        numbers = {name: class_names.index(name) for name in names}
    elif set(named) == {0} and len(names) == len(class_names):
        numbers = {name: number for number, name in enumerate(names)}
    else:
        return None
    return [numbers[folder] for folder in folders]
