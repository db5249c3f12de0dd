"""Checks of images, policies and patched models that raise an error before any work is done."""

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy.drop import UNMIXED, DropPolicy
from tinydrop_kernels.torch_internals import transforms

NO_MIX = ", ".join(f"{name}={value}" for name, value in UNMIXED.items())


def check_images(model: TimmModule, images: Tensor) -> None:
    """Raise an error if a patched model cannot be called with the images.

    Raises:
        ValueError, TypeError: the images do not fit the model.
        RuntimeError: the call runs under a torch transform that the operators do not support.
    """
    unknown = [name for name in transforms() if name != "grad"]  # because the operators support only backward passes
    if unknown:
        raise RuntimeError(
            f"model: a patched model does not work under {unknown[-1]}; use reverse mode on whole batches "
            "(torch.func.grad, vjp, jacrev), or unpatch it"
        )
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


def check_policy(policy: DropPolicy, target: int, guidance: int, multi_label: bool) -> None:
    """Raise ValueError if a policy mixes answers that cannot be mixed.

    Args:
        policy: the policy to check.
        target, guidance: numbers of classes of the two models.
        multi_label: the target's head is one of sigmoids.
    """
    if not policy.mixes_answers:
        return
    if multi_label:
        raise ValueError(
            f"policy: got {policy}, but with multi_label=True there are no exits, blends or second looks, because "
            f"sigmoids do not give one probability distribution over the classes; expected {NO_MIX}"
        )
    if target != guidance:
        raise ValueError(
            f"guidance: it knows {guidance} classes and the model {target}, so its answers cannot stand for the "
            f"model's; expected a guidance of the same classes, or a policy with {NO_MIX}"
        )
    if target == 1:
        raise ValueError(
            f"policy: the confidence of a single class is always 1, so every image would exit; expected {NO_MIX} for "
            "a model of one class"
        )


def check_answers(policy: DropPolicy, target: Tensor, guidance: Tensor) -> None:
    """Raise ValueError if a policy mixes answers and the two models answered different numbers of classes."""
    if policy.mixes_answers and target.shape[1] != guidance.shape[1]:
        raise ValueError(
            f"model: it answered {target.shape[1]} classes, expected the guidance's {guidance.shape[1]}; a hook on its "
            "head, or the like, changes the head's output"
        )


def check_channels(guidance: int, target: int) -> None:
    """Raise ValueError if the guidance model's images have another number of channels than the target's."""
    if guidance != target:
        raise ValueError(f"guidance: it sees {guidance} channels and the model {target}")


def check_patched(model: TimmModule) -> None:
    """Raise ValueError if a model is not patched."""
    if not hasattr(model, "tinydrop"):
        raise ValueError(f"model: this {type(model).__name__} is not patched; call tinydrop_kernels.patch on it first")


def check_eval(model: TimmModule) -> None:
    """Raise RuntimeError if a model is in training mode."""
    if model.training:
        raise RuntimeError("model: it is in training mode, in which it drops nothing; call model.eval() first")


def check_classifier(classes: int) -> None:
    """Raise ValueError if a model has no classes."""
    if not classes:
        raise ValueError("model: got one without classes (num_classes=0), expected a classifier")
