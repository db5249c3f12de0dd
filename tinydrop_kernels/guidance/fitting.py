"""Fitting of a guidance model to a target: a linear head on a frozen, pretrained backbone.

The head learns the target's own answers, so images without labels suffice.
"""

import os
from collections.abc import Iterable, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm

from tinydrop_kernels.checkpoints import class_names, load_model
from tinydrop_kernels.engine.batches import labelled_batches
from tinydrop_kernels.engine.checks import check_channels, check_images
from tinydrop_kernels.engine.head import count_classes
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.flops import count_flops
from tinydrop_kernels.guidance.folding import copied
from tinydrop_kernels.guidance.gradcam import agree
from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE, Guidance, GuidanceError
from tinydrop_kernels.normalization import normalization_of
from tinydrop_kernels.ops.types import TimmModule

DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)  # strong first, as each fit starts at the last
HELD_OUT = 10  # every tenth image chooses the weight decay and judges the backbone
MIN_IMAGES = 2 * HELD_OUT
ITERATIONS = 100  # of L-BFGS, for each weight decay


class FittedGuidance(NamedTuple):
    """A guidance model that was fitted to a target, with what is known about it."""

    model: TimmModule  # the timm model with its fitted head, as it can be saved; float32
    guidance: Guidance  # made from the model, on the target's device
    agreement: float  # share of the held-out images whose top class is the target's
    flops: int  # per image
    weight_decay: float
    images: int  # all images, with the held-out ones

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model to a folder that ``patch``, ``load_model`` and the commands take as guidance.

        Raises:
            CheckpointError: timm cannot build this model from its own configuration.
            OSError: the folder cannot be written.
        """
        names = {"label_names": self.model.pretrained_cfg["label_names"]}
        save_for_hf(self.model, os.fspath(folder), model_config=names, safe_serialization=True)
        load_model(os.fspath(folder), "guidance")  # a model that does not load should fail here


def fit_guidance(
    model: TimmModule,
    loader: Iterable[Any],
    guidance: str | nn.Module | Sequence[str | nn.Module] = DEFAULT_GUIDANCE,
    *,
    progress: bool = True,
) -> Guidance:
    """Return a guidance model with the target's classes, fitted to the target's own answers.

    The target and a frozen, pretrained backbone see every image once. A linear head is then fitted to the target's
    probabilities by L-BFGS. If the loader has labels, the head learns the mean of these probabilities and the labels.
    Every tenth image is held out to choose the weight decay. The last fit uses all images.

    Args:
        model: the target, in eval mode. If it is patched, its dense answers are used.
        loader: batches of images, or batches ``(images, labels)``. Images are floating ``(n, channels, height,
            width)``, normalised for the target. Labels are integers ``(n,)``. At least 20 images are needed. They
            should be shuffled or sorted by class, because every tenth image should be like the others.
        guidance: the pretrained backbone: a name or checkpoint for :func:`checkpoints.load_model`, or a timm model. Its
            own head is not used, and the model is not changed. Of several backbones, the one that agrees most often
            with the target on the held-out images is returned, or the cheapest of those.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        The guidance model, in float32 on the target's device, for :func:`patch`. To save it or to compare backbones,
        call :func:`guidance.fitting.fit_each`.

    Raises:
        UnsupportedModelError: the target's family is not supported.
        CheckpointError: a backbone's weights cannot be loaded.
        GuidanceError: a backbone cannot be used as guidance model, or its classifier is not ``nn.Linear``.
        ValueError, TypeError: another argument does not fit, or there are too few images.

    Example:
        >>> loader = [torch.randn(10, 3, 224, 224) for _ in range(2)]
        >>> fitted = tdk.fit_guidance(model, loader, guidance, progress=False)
        >>> tdk.patch(model, fitted)(images).shape
        torch.Size([2, 10])
    """
    guidances = guidance if isinstance(guidance, Sequence) and not isinstance(guidance, str) else [guidance]
    return best(fit_each(model, loader, guidances, progress=progress)).guidance


def best(fitted: Sequence[FittedGuidance]) -> FittedGuidance:
    """Return the one that agrees most often with the target. Of several such, return the cheapest."""
    return max(fitted, key=lambda one: (one.agreement, -one.flops))


@torch.inference_mode(False)  # because autograd refuses tensors made in inference mode
def fit_each(
    model: TimmModule, loader: Iterable[Any], guidances: Sequence[str | nn.Module], *, progress: bool = True
) -> list[FittedGuidance]:
    """Return a fitted guidance model for each backbone, with its agreement and its FLOPs.

    Args:
        guidances: one or more backbones.
        model, loader, progress: as for :func:`fit_guidance`.

    Raises:
        The errors of :func:`fit_guidance`.

    Example:
        >>> loader = [torch.randn(20, 3, 224, 224)]
        >>> (fitted,) = tdk.guidance.fitting.fit_each(model, loader, [guidance], progress=False)
        >>> fitted.images, 0 <= fitted.agreement <= 1
        (20, True)
        >>> fitted.save("folder")  # doctest: +SKIP
    """
    family_of(model)
    classes = count_classes(model)
    if classes < 2:
        raise ValueError(f"model: got one with {classes} classes, expected a classifier of 2 or more")
    if model.training:
        raise ValueError("model: it is in training mode, expected one in eval mode")
    if hasattr(model, "tinydrop") and model.tinydrop.multi_label:
        raise ValueError("model: it is multi-label, so its answers are no probabilities to learn; expected one label")
    if not guidances:
        raise ValueError("guidance: got none, expected one or more")
    device, names = next(model.parameters()).device, class_names(model, classes)
    backbones = [_with_new_head(guidance, names).to(device) for guidance in guidances]
    made = [_checked(backbone, model) for backbone in backbones]
    probabilities, labels, features = _collect(model, made, loader, classes, progress)
    wanted = probabilities if labels is None else (probabilities + F.one_hot(labels, classes)) / 2
    fitted = []
    for backbone, own in zip(backbones, features, strict=True):
        decay, held_out = choose_decay(own, wanted)
        agreement = (held_out.argmax(1) == probabilities[_is_held_out(own)].argmax(1)).double().mean().item()
        (found,) = fit_heads(own, wanted, [decay])
        with torch.no_grad():
            for head in _heads(backbone):
                head.weight.copy_(found.weight)
                head.bias.copy_(found.bias)
        guidance = Guidance(backbone)
        flops = count_flops(guidance.model, (guidance.in_chans, *guidance.input_size))
        fitted.append(FittedGuidance(backbone, guidance, agreement, flops, decay, len(own)))
    return fitted


def _heads(backbone: TimmModule) -> tuple[nn.Linear, ...]:
    """Return the linear heads. A distilled model has two, whose logits it averages."""
    classifier = backbone.get_classifier()
    heads: tuple[nn.Linear, ...] = classifier if isinstance(classifier, tuple) else (classifier,)
    return heads


def _with_new_head(guidance: str | nn.Module, names: list[str]) -> TimmModule:
    """Return a copy of the backbone with a new linear head, which knows the names of the target's classes.

    Several heads are made equal, because the mean of their logits is then linear in the mean of their inputs.
    """
    if isinstance(guidance, str):
        backbone = load_model(guidance, "guidance")
    elif isinstance(guidance, nn.Module) and not isinstance(guidance, Guidance):
        backbone = copied(guidance)
    else:
        raise TypeError(f"guidance: got {type(guidance).__name__}, expected a timm name or a timm model")
    kind = type(backbone).__name__
    try:
        backbone.float().reset_classifier(len(names))
    except Exception as error:  # a model of another library may raise any error
        raise GuidanceError(f"guidance: {kind} cannot be given a head of {len(names)} classes: {error}") from error
    heads = _heads(backbone)
    for head in heads:
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise GuidanceError(
                f"guidance: the classifier of {kind} is {type(head).__name__}, expected nn.Linear with a bias"
            )
        head.load_state_dict(heads[0].state_dict())
    config = {key: value for key, value in backbone.pretrained_cfg.items() if key != "label_descriptions"}
    backbone.pretrained_cfg = config | {"num_classes": len(names), "label_names": names}
    return backbone.eval()


def _checked(backbone: TimmModule, model: TimmModule) -> Guidance:
    """Return the backbone as guidance model.

    Raises:
        GuidanceError: it cannot be one, or its logits are not those of its head on its pooled features.
        ValueError: it has another number of image channels than the target.
    """
    guidance = Guidance(backbone)
    check_channels(guidance.in_chans, model.in_chans)
    head, kind = _heads(backbone)[0], type(backbone).__name__
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(2, guidance.in_chans, *guidance.input_size, generator=draws).to(head.weight.device)
    logits, features = guidance(noise).logits, guidance.pre_logits(noise)
    if features.shape != (2, head.in_features) or not agree(head(features), logits, logits):
        raise GuidanceError(f"guidance: the logits of {kind} are not its classifier on its pooled features")
    return guidance


@torch.no_grad()
def _collect(
    model: TimmModule, guidances: Sequence[Guidance], loader: Iterable[Any], classes: int, progress: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Run the target and the backbones on all images.

    Returns:
        The target's probabilities ``(images, classes)``, the labels ``(images,)`` or None, and each backbone's features
        ``(images, dim)``.
    """
    weight = next(model.parameters())
    dense = model.tinydrop.dense if hasattr(model, "tinydrop") else model
    mean, std = normalization_of(model, model.in_chans)
    probabilities: list[Tensor] = []
    labels: list[np.ndarray] = []
    features: list[list[Tensor]] = [[] for _ in guidances]
    total = len(loader) if isinstance(loader, Sized) else None
    batches = labelled_batches(loader, classes)
    for images, own in tqdm(batches, total=total, unit="batch", disable=None if progress else True):
        images = images.to(weight.device)
        cast = images.to(weight.dtype)
        check_images(model, cast)
        probabilities.append(dense(cast).float().softmax(dim=1))
        labels += [] if own is None else [own]
        for guidance, found in zip(guidances, features, strict=True):
            found.append(guidance.pre_logits(images.float(), mean, std))
    count = sum(map(len, probabilities))
    if count < MIN_IMAGES:
        raise ValueError(f"loader: got {count} images, expected at least {MIN_IMAGES}, better hundreds")
    answers, joined = torch.cat(probabilities), [torch.cat(found) for found in features]
    if not all(tensor.isfinite().all() for tensor in (answers, *joined)):
        raise ValueError("model: its answers or the guidance model's features are not finite; check the images")
    known = torch.from_numpy(np.concatenate(labels)).long().to(weight.device) if labels else None
    return answers, known, joined


class Head(NamedTuple):
    """A linear head, in the order that ``F.linear`` takes."""

    weight: Tensor  # (classes, dim)
    bias: Tensor  # (classes,)


def _is_held_out(features: Tensor) -> Tensor:
    return torch.arange(len(features), device=features.device) % HELD_OUT == HELD_OUT - 1


def choose_decay(features: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Return the weight decay with the lowest cross entropy on the held-out images, and its head's logits on them.

    Args:
        features: float32 ``(images, dim)``.
        wanted: float32 ``(images, classes)``, the probabilities to learn.
    """
    held_out = _is_held_out(features)
    heads = fit_heads(features[~held_out], wanted[~held_out], DECAYS)
    logits = [F.linear(features[held_out], *head) for head in heads]
    losses = [F.cross_entropy(found, wanted[held_out]).item() for found in logits]
    chosen = losses.index(min(losses))
    return DECAYS[chosen], logits[chosen]


@torch.enable_grad()
def fit_heads(features: Tensor, wanted: Tensor, decays: Sequence[float]) -> list[Head]:
    """Return the head for each weight decay that minimises cross entropy plus ``decay / 2`` times the squared weights.

    The squared weights are those on features of mean 0 and standard deviation 1. The result is for the features as they
    are given. A feature that hardly varies is scaled less, because its standard deviation is mostly noise.

    Args:
        features, wanted: as for :func:`choose_decay`.
        decays: weight decays. Each fit starts at the result of the one before.
    """
    mean, std = features.mean(dim=0), features.std(dim=0)
    std = std.clamp_min(std.mean().item() / 100).clamp_min(torch.finfo(std.dtype).tiny)
    scaled = (features - mean) / std
    weight = features.new_zeros(wanted.shape[1], features.shape[1], requires_grad=True)
    bias = features.new_zeros(wanted.shape[1], requires_grad=True)
    found = []
    for decay in decays:
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=ITERATIONS, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def loss(solver: torch.optim.LBFGS = solver, decay: float = decay) -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(scaled, weight, bias), wanted) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        unscaled = weight.detach() / std
        found.append(Head(unscaled, bias.detach() - unscaled @ mean))
    return found
