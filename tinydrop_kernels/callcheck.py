"""What is refused before any work is done: images, policies, and what has become of a patched model."""

import torch
from torch import Tensor

from tinydrop_kernels.families import Family
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy import DropPolicy


def check_images(model: TimmModule, family: Family, images: Tensor) -> None:
    """Raise ValueError or TypeError where a patched model cannot be called with the images."""
    weight = next(model.parameters())
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a Tensor")
    if images.ndim != 4:
        raise ValueError(f"images: got {images.ndim} dimensions, expected (batch, channels, height, width)")
    if images.shape[1] != model.in_chans:
        raise ValueError(f"images: got {images.shape[1]} channels, expected {model.in_chans}")
    if images.device != weight.device:
        raise ValueError(f"images: got them on {images.device}, expected the model's {weight.device}")
    if weight.is_meta:
        raise ValueError("model: it is on the meta device and has no weights")
    castable = images.is_floating_point() and torch.is_autocast_enabled(images.device.type)
    if images.dtype != weight.dtype and not castable:
        raise TypeError(f"images: got {images.dtype}, expected the model's {weight.dtype}")
    family.check_images(model, images)


def check_classes(policy: DropPolicy, target: int, guidance: int) -> None:
    """Raise ValueError where a policy mixes the answers of models of so many classes that cannot be mixed."""
    if not policy.mixes_answers:
        return
    if target != guidance:
        raise ValueError(
            f"guidance: it knows {guidance} classes and the model {target}, so its answers cannot stand for the "
            "model's; expected a guidance of the same classes, or a policy with tau=None, blend=0, second_look=None"
        )
    if target == 1:
        raise ValueError(
            "policy: the confidence of a single class is always 1, so every image would exit; expected tau=None, "
            "blend=0, second_look=None for a model of one class"
        )
