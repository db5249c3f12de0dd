"""``patch`` and ``unpatch``: a timm model made to drop tokens in place, and put back exactly as it was.

Nothing is replaced in the model's tree: a few attributes are set on instances (``forward`` of the model and of its
attentions, ``_apply`` so that the guidance model follows ``.to()`` and ``.half()``, and ``tinydrop``), and removed
again. The guidance model is not a submodule, so the ``state_dict`` is untouched.
"""

import copy
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.aliases import TimmModule
from tinydrop_kernels.checkpoints import load_model
from tinydrop_kernels.families import UnsupportedModelError, check_supported, family_of
from tinydrop_kernels.flops import guidance_flops, target_flops
from tinydrop_kernels.guidance import DEFAULT_GUIDANCE, Guidance, match_statistics, per_channel, resized
from tinydrop_kernels.policy import DropPolicy
from tinydrop_kernels.ragged import RaggedLayout


@dataclass(frozen=True)
class Call:
    """What happened to the images of one call. Tensors stay where they were computed; nothing is copied to be kept."""

    selection: ops.Selection
    grid_size: tuple[int, int]
    summary: bool
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, filled when ``TinyDrop.timed``

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def counts(self) -> Tensor:
        """int32 ``(batch,)``: patches kept of each image, 0 for one that exited."""
        return self.selection.counts

    @property
    def exited(self) -> Tensor:
        """bool ``(batch,)``."""
        return self.selection.counts == 0

    @property
    def kept(self) -> list[Tensor]:
        """For each image the kept patches' numbers in raster order; empty for one that exited."""
        return [row[row >= 0] for row in self.selection.indices]

    @property
    def confidence(self) -> Tensor:
        """float32 ``(batch,)``: the guidance model's."""
        return self.selection.confidence

    @property
    def saliency(self) -> Tensor:
        """float32 ``(batch, rows, columns)`` on the target's grid."""
        return self.selection.saliency


@dataclass(frozen=True)
class Report:
    """The last call in numbers; ``str`` of it is for reading."""

    images: int
    exits: int
    mean_keep: float  # of the patches of images that did not exit; NaN where all did
    flops: int  # guidance and target
    dense_flops: int  # the target alone, on all tokens of all images
    seconds: dict[str, float]

    @property
    def flops_saved(self) -> float:
        """Fraction of the dense FLOPs that was not spent."""
        return 1 - self.flops / self.dense_flops

    def __str__(self) -> str:
        lines = [
            f"images {self.images}, exits {self.exits}, mean keep of the others {self.mean_keep:.1%}",
            f"GFLOPs {self.flops / 1e9:.2f}, dense {self.dense_flops / 1e9:.2f}, saved {self.flops_saved:.1%}",
        ]
        if self.seconds:
            lines.append("ms " + ", ".join(f"{stage} {1e3 * spent:.1f}" for stage, spent in self.seconds.items()))
        return "\n".join(lines)


class TinyDrop:
    """What a patched model carries as ``model.tinydrop``.

    Attributes:
        guidance: the guidance model.
        policy: may be replaced between calls.
        timed: measure the wall time of each stage of the next calls (synchronises the device at each).
        last: what happened in the last call, or None before the first.
    """

    def __init__(self, model: TimmModule, guidance: Guidance, policy: DropPolicy):
        self._model = model
        self.guidance = guidance
        self.policy = policy
        self.timed = False
        self.last: Call | None = None
        config = resolve_model_data_config(model)
        source = (per_channel(config["mean"], model.in_chans), per_channel(config["std"], model.in_chans))
        self._rescale = match_statistics(source, (guidance.mean, guidance.std))

    @property
    def policy(self) -> DropPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: DropPolicy) -> None:
        if not isinstance(policy, DropPolicy):
            raise TypeError(f"policy: got {type(policy).__name__}, accepted is a DropPolicy")
        self._check_classes(policy)
        self._policy = policy

    def report(self) -> Report:
        """Exits, kept tokens, FLOPs against dense and, when timed, seconds by stage, of the last call.

        Raises:
            RuntimeError: there was no call yet.
        """
        if self.last is None:
            raise RuntimeError("no image has gone through the patched model yet")
        call, model = self.last, self._model
        counts = call.counts.tolist()
        staying = [count for count in counts if count]
        mean_keep = sum(staying) / (len(staying) * call.num_patches) if staying else float("nan")
        flops = len(counts) * self._guidance_flops
        flops += target_flops(model, counts, call.grid_size, call.summary)
        dense = target_flops(model, [call.num_patches] * len(counts), call.grid_size, summary=False)
        return Report(len(counts), len(counts) - len(staying), mean_keep, flops, dense, call.seconds)

    @cached_property
    def _guidance_flops(self) -> int:
        return guidance_flops(self.guidance)

    def run(self, images: Tensor) -> Tensor:
        """Guidance, select, pack, embed, blocks, pool and head, merge: logits ``(batch, num_classes)``."""
        model, family, policy = self._model, family_of(self._model), self.policy
        self._check_images(images)
        self._check_classes(policy)
        if len(images) == 0:
            self.last = None
            return type(model).forward(model, images)
        seconds: dict[str, float] = {}
        stage = partial(_timed_stage, seconds, images.device) if self.timed else _untimed_stage
        grid = family.grid_size(model, images)
        with stage("guidance"):
            guided = self._guide(images)
        with stage("select"):
            selection = self._select(guided, grid)
        with stage("pack"):
            num_patches = grid[0] * grid[1]
            layout = RaggedLayout(*ops.pack(selection.counts, num_patches, model.num_prefix_tokens, policy.summary))
        if layout.total == 0:
            logits = guided.logits
        else:
            with stage("embed"):
                tokens = family.embed(model, images, selection.indices, layout, grid, policy.summary)
            with stage("blocks"):
                tokens = family.encode(model, tokens, layout)
            with stage("head"):
                logits = family.classify(model, tokens, layout)
                if policy.tau is not None:
                    exited = (selection.counts == 0)[:, None]
                    logits = torch.where(exited, guided.logits.to(logits.dtype), logits)
        self.last = Call(selection, grid, policy.summary, seconds)
        return logits

    def _guide(self, images: Tensor):
        images = resized(images, self.guidance.input_size)
        if self._rescale is not None:
            scale, offset = (t.to(images.dtype) for t in self._rescale)
            images = images * scale + offset
        if images.device.type == "cpu":  # where convolutions are 1.2 to 1.7 times faster on it (docs/decisions.md)
            images = images.contiguous(memory_format=torch.channels_last)
        return self.guidance(images)

    @torch.no_grad()
    def _select(self, guided, grid: tuple[int, int]) -> ops.Selection:
        law = (self.policy.tau, self.policy.gamma, self.policy.min_keep)
        if guided.saliency is not None:
            return ops.select_from_saliency(guided.logits, guided.saliency, grid, *law)
        guidance = self.guidance
        return ops.select_tokens(
            guided.logits, guided.features, guidance.class_weight, guidance.feature_size, grid, *law
        )

    def _check_images(self, images: Tensor) -> None:
        weight = next(self._model.parameters())
        if not isinstance(images, Tensor):
            raise TypeError(f"images: got {type(images).__name__}, accepted is a Tensor")
        if images.ndim != 4:
            raise ValueError(f"images: got {images.ndim} dimensions, accepted is (batch, channels, height, width)")
        if images.shape[1] != self._model.in_chans:
            raise ValueError(f"images: got {images.shape[1]} channels, accepted are {self._model.in_chans}")
        if images.device != weight.device:
            raise ValueError(f"images: got them on {images.device}, accepted is the model's {weight.device}")
        castable = images.is_floating_point() and torch.is_autocast_enabled(images.device.type)
        if images.dtype != weight.dtype and not castable:
            raise TypeError(f"images: got {images.dtype}, accepted is the model's {weight.dtype}")
        family_of(self._model).check_images(self._model, images)

    def _check_classes(self, policy: DropPolicy) -> None:
        target, guidance = self._model.num_classes, self.guidance.num_classes
        if policy.tau is not None and target != guidance:
            raise ValueError(
                f"guidance: it knows {guidance} classes and the model {target}, so its answers cannot stand for the "
                "model's; accepted is a guidance of the same classes, or a policy with tau=None"
            )

    def _apply(self, fn) -> None:
        with torch.inference_mode(False):  # autograd refuses tensors made in inference mode
            self.guidance._apply(fn)
            if self._rescale is not None:
                self._rescale = tuple(fn(t) for t in self._rescale)


def patch(
    model: TimmModule,
    guidance: str | nn.Module | Guidance = DEFAULT_GUIDANCE,
    policy: DropPolicy | None = None,
) -> TimmModule:
    """Make a timm model drop tokens, in place.

    The model is called as before and answers in the same shape; ``model.tinydrop`` tells what it did. In ``train()``
    mode it runs dense. ``forward_features``, ``forward_head`` and ``forward_intermediates`` stay timm's own, dense.

    Args:
        model: a supported timm model (:mod:`tinydrop_kernels.families`).
        guidance: the tiny classifier: a timm name or a checkpoint (:func:`checkpoints.load_model`), a timm model, or
            a :class:`Guidance`. A copy of it is taken, moved to the model's device and dtype, and follows the model
            from then on. It must know the same classes unless the policy has ``tau=None``.
        policy: a :class:`DropPolicy`; by default ``DropPolicy()``, without early exit if the model has no classes.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: the model, or something in it, is not supported; also found out by trying the patched
            model on a little noise, hooks and all.
        CheckpointError: the weights of the guidance model cannot be had.
        GuidanceError: the guidance model has no classes or no feature map.
        ValueError, TypeError: an argument out of range; a model that is patched already; guidance with other classes.
    """
    if isinstance(getattr(model, "tinydrop", None), TinyDrop):
        raise ValueError("model: it is patched already; change model.tinydrop.policy, or unpatch it first")
    check_supported(model)
    if policy is None:
        policy = DropPolicy() if model.num_classes else DropPolicy(tau=None)
    if isinstance(guidance, str):
        guidance = load_model(guidance, "guidance")
    elif not isinstance(guidance, nn.Module):
        raise TypeError(f"guidance: got {type(guidance).__name__}, accepted is a timm name, a model or a Guidance")
    elif guidance is model:
        raise ValueError("guidance: got the model itself, accepted is another, smaller model")
    guidance = copy.deepcopy(guidance) if isinstance(guidance, Guidance) else Guidance(guidance)
    if guidance.in_chans != model.in_chans:
        raise ValueError(f"guidance: it sees {guidance.in_chans} channels and the model {model.in_chans}")
    tinydrop = TinyDrop(model, guidance.eval(), policy)
    weight = next(model.parameters())
    tinydrop._apply(lambda t: t.to(weight.device, weight.dtype if t.is_floating_point() else None))

    model.tinydrop = tinydrop
    model.forward = partial(_forward, model)
    model._apply = partial(_apply, model)
    model._replicate_for_data_parallel = _refuse_data_parallel
    family = family_of(model)
    for attention in family.attentions(model):
        attention.forward = partial(family.attend, attention)
    try:
        reason = None if weight.is_meta else _tried(family.differs, model)
        if reason:
            raise UnsupportedModelError(f"model: {type(model).__name__} with {reason}")
    except BaseException:  # an interrupt too must leave the model as it was
        unpatch(model)
        raise
    return model


def unpatch(model: TimmModule) -> TimmModule:
    """Put a patched model back exactly as it was, and return it.

    Raises:
        ValueError: the model is not patched.
    """
    if not isinstance(getattr(model, "tinydrop", None), TinyDrop):
        raise ValueError("model: it is not patched")
    for name in ("forward", "_apply", "_replicate_for_data_parallel", "tinydrop"):
        delattr(model, name)
    for attention in family_of(model).attentions(model):
        vars(attention).pop("forward", None)  # none where the user has put in an attention since
    return model


@torch.inference_mode()
def _tried(differs: Callable[[TimmModule], str | None], model: TimmModule) -> str | None:
    """The family's trial, in eval mode without autocast; every module's mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            return differs(model)
    finally:
        for module, training in modes.items():
            module.training = training


def _forward(model: TimmModule, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if model.training:
        return type(model).forward(model, x, attn_mask=attn_mask, is_causal=is_causal)
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask, is_causal: a patched model has no dense sequence they could refer to")
    return model.tinydrop.run(x)


def _apply(model: TimmModule, fn, recurse: bool = True) -> TimmModule:
    model.tinydrop._apply(fn)
    return type(model)._apply(model, fn, recurse)


def _refuse_data_parallel():
    raise RuntimeError("a patched model cannot be replicated by DataParallel: use one process per GPU")


@contextmanager
def _timed_stage(seconds: dict[str, float], device: torch.device, name: str):
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - start


def _untimed_stage(name: str):
    return nullcontext()
