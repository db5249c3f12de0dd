"""``patch`` and ``unpatch``, which make a timm model drop tokens in place and undo that exactly.

No module of the model is replaced. ``patch`` sets a few attributes on instances, and ``unpatch`` removes those that are
still what ``patch`` has set. The guidance model is not a submodule, so the ``state_dict`` does not change. Methods are
set as ``functools.partial``, because a bound method would be pickled by its name and load back as timm's own method.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from tinydrop_kernels.checkpoints import load_model
from tinydrop_kernels.engine import TinyDrop
from tinydrop_kernels.engine.attributes import InstanceAttributes, reduced
from tinydrop_kernels.engine.checks import check_channels, check_patched
from tinydrop_kernels.engine.cuda_graphs import Graphs, has_graphs
from tinydrop_kernels.engine.head import count_classes, in_eval_mode
from tinydrop_kernels.families import Family, UnsupportedModelError, family_of, find_mismatch
from tinydrop_kernels.families.blocks import linears
from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE, Guidance
from tinydrop_kernels.normalization import check_statistic, normalization_of
from tinydrop_kernels.ops.derived import note_training
from tinydrop_kernels.ops.onednn import run_linear, run_prepacked
from tinydrop_kernels.ops.registry import HAS_TRITON
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.policy.calibrated import CalibratedPolicy
from tinydrop_kernels.policy.drop import UNMIXED, DropPolicy
from tinydrop_kernels.policy.fingerprint import fingerprint_of
from tinydrop_kernels.torch_internals import is_own


def patch(
    model: TimmModule,
    guidance: str | nn.Module | Guidance = DEFAULT_GUIDANCE,
    policy: DropPolicy | CalibratedPolicy | str | os.PathLike[str] | None = None,
    *,
    guidance_size: int | tuple[int, int] | None = None,
    compile: bool = False,
    prepack: bool = False,
    graphs: bool = False,
    multi_label: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> TimmModule:
    """Make a timm model drop tokens, in place.

    Call the model as before. In eval mode it drops tokens, and ``model.tinydrop.report()`` says how much the last call
    saved. The answers have timm's shape and dtype. Under the default policy, and any other that can exit, blend or take
    a second look, they are log-probabilities, with softmax and argmax as for logits. Otherwise they are the logits.

    In ``train()`` mode the model runs dense, and ``forward_features``, ``forward_head`` and ``forward_intermediates``
    always do. After training, and after writing to weights through ``.data``, call ``model.tinydrop.refresh()``.

    Args:
        model: a timm model of a supported family (:mod:`tinydrop_kernels.families`).
        guidance: a tiny classifier with the same classes: a timm model, a :class:`Guidance`, or a name or checkpoint
            for :func:`checkpoints.load_model`. A copy is used, on the model's device and in its dtype. Its classes may
            differ if the policy neither exits, blends nor takes a second look.
        policy: how much to drop: a :class:`DropPolicy`, or the result of :func:`calibrate` or the path of its file. The
            default is ``DropPolicy()``. It has no exits, blend or second look if the model is multi-label or has fewer
            than two classes. A calibrated policy also sets the guidance size, and fits only the models it was made for.
        guidance_size: side, or height and width, of the images that the guidance model is given. The default is the
            guidance model's own size. A smaller size is faster; the effect on accuracy depends on the images.
        compile: run the guidance model and the target's blocks through ``torch.compile``, for any number of images and
            tokens. The first batch of one image and the first of several then take a minute or more each.
        prepack: on a CPU, also keep the weights of the blocks' linear layers in oneDNN's own layout. This is faster,
            most of all with few tokens, and takes the memory of those weights a second time.
        graphs: replay calls from CUDA graphs, so that small batches do not wait for the host. This needs a GPU, and
            calls without gradients and autocast. Experimental: no GPU has run it yet. See
            :mod:`tinydrop_kernels.engine.cuda_graphs`.
        multi_label: the head is one of sigmoids. Policies that exit, blend or take a second look are then refused.
        mean, std: normalisation of the images, one number per channel. The default is the model's ``pretrained_cfg``.
            The guidance model's images are derived from it, so wrong numbers harm exits, blends and the patches chosen.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: the model or a part of it is not supported. This includes models whose patched answer on
            noise differs from timm's.
        CheckpointError: the guidance model's weights cannot be loaded.
        GuidanceError: the guidance model has no classes or no feature map, or does not take images of the given size.
        PolicyFileError: the policy file cannot be read, or it was made for other models.
        ValueError, TypeError: an argument is out of range or does not fit the model, or the model is already patched.

    Example:
        >>> model = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.5))  # keep half of the patches
        >>> model(images).shape
        torch.Size([2, 10])
        >>> model.tinydrop.last.counts.tolist()  # of 196 patches
        [98, 98]
    """
    family, classes = _supported(model)
    own_mean, own_std = normalization_of(model, model.in_chans)
    normalization = (
        own_mean if mean is None else check_statistic("mean", mean, model.in_chans),
        own_std if std is None else check_statistic("std", std, model.in_chans),
    )
    calibrated = CalibratedPolicy.load(policy) if isinstance(policy, str | os.PathLike) else policy
    if isinstance(calibrated, CalibratedPolicy):
        policy = calibrated.policy
    else:
        policy, calibrated = calibrated, None
    if policy is None:
        policy = DropPolicy(**UNMIXED) if classes < 2 or multi_label else DropPolicy()
    _check_ways(model, prepack, graphs)
    guidance = _own_guidance(model, guidance, guidance_size)
    if calibrated is not None:
        calibrated.check(fingerprint_of(model, classes), guidance.fingerprint)
        with torch.inference_mode(False):
            guidance = guidance.at_size(calibrated.input_size)
    guidance.compiled = guidance.compiled or compile
    recorded = Graphs() if graphs else None
    tinydrop = TinyDrop(model, guidance.eval(), policy, compile, recorded, multi_label, normalization)
    _follow(model, guidance)
    tinydrop.attributes = _attributes(model, family, tinydrop, prepack)
    try:
        tinydrop.attributes.set()
        tinydrop.refresh()
        with _naming_what_is_missing(model):
            reason = None if next(model.parameters()).is_meta else _tried(family, model)
        if reason:
            raise UnsupportedModelError(f"model: {type(model).__name__} with {reason}")
        tinydrop.remember()
    except BaseException:  # an interrupt too must leave the model as it was
        unpatch(model)
        raise
    image = torch.empty(1, model.in_chans, *model.patch_embed.img_size, device="meta")
    if policy.coarsen and len(tinydrop.levels(family.grid_size(model, image))) == 1:
        warnings.warn(
            f"{type(model).__name__} with {type(model.patch_embed).__name__} keeps its dense grid, because its stem or "
            "its windows fit no other image size; besides exits, only dropped patches save time (needs coarsen < 1)",
            stacklevel=2,
        )
    return model


@contextmanager
def dense(model: TimmModule) -> Iterator[TimmModule]:
    """Run a patched model as timm's own within the ``with`` block, in this thread.

    No patch is dropped, no image exits, and timm's own code calls the modules. Use it for hooks that expect timm's
    shapes, and for profilers and summaries.

    Raises:
        ValueError: the model is not patched.

    Example:
        >>> dense_logits = model(images)
        >>> model = tdk.patch(model, guidance)
        >>> with tdk.dense(model):
        ...     torch.allclose(model(images), dense_logits, atol=1e-4)
        True
    """
    check_patched(model)
    tinydrop = model.tinydrop
    before, tinydrop.is_dense = tinydrop.is_dense, True
    try:
        yield model
    finally:
        tinydrop.is_dense = before


def unpatch(model: TimmModule) -> TimmModule:
    """Undo :func:`patch` exactly, and return the model. Attributes that you have set since then stay.

    Raises:
        ValueError: the model is not patched, or only a module inside it is.

    Example:
        >>> model = tdk.patch(model, guidance)
        >>> hasattr(tdk.unpatch(model), "tinydrop")
        False
    """
    tinydrop = vars(model).get("tinydrop") if isinstance(model, nn.Module) else None
    if not isinstance(tinydrop, TinyDrop):
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            if isinstance(vars(module).get("tinydrop"), TinyDrop):
                raise ValueError(f"model: the patched model is inside this {type(model).__name__}; unpatch its {name}")
        raise ValueError("model: it is not patched")
    tinydrop.attributes.remove_from()
    return model


def _supported(model: TimmModule) -> tuple[Family, int]:
    """Return the family and the number of classes of a model that can be patched.

    Raises:
        UnsupportedModelError, ValueError: it cannot.
    """
    if is_patched(model):
        raise ValueError("model: it is patched already; change model.tinydrop.policy, or unpatch it first")
    if isinstance(model, nn.Module) and hasattr(model, "_orig_mod"):
        raise UnsupportedModelError("model: it is compiled; patch the model, then compile it")
    family = family_of(model)
    with _naming_what_is_missing(model):
        reason = family.unsupported_reason(model)
        if reason:
            raise UnsupportedModelError(f"model: {type(model).__name__} with {reason}")
        if any(is_own(vars(attention).get("forward")) for attention in family.attentions(model)):
            raise UnsupportedModelError(
                "model: its blocks are shared with or copied from a model that is patched already; unpatch that model "
                "first, or build this one anew"
            )
        return family, count_classes(model)


def _check_ways(model: TimmModule, prepack: bool, graphs: bool) -> None:
    """Raise ValueError if the model cannot be prepacked or recorded as asked."""
    if prepack and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "prepack: got a model made in inference mode, where changes of weights cannot be noticed; make it outside"
        )
    device = next(model.parameters()).device
    if graphs and not has_graphs(device.type):
        raise ValueError(f"graphs: got a model on {device}, expected one on a GPU that has CUDA graphs; move it first")
    if graphs and not HAS_TRITON:
        raise ValueError("graphs: Triton is not installed, and without it every layer reads back; install it")


def _own_guidance(
    model: TimmModule, guidance: str | nn.Module | Guidance, guidance_size: int | tuple[int, int] | None
) -> Guidance:
    """Return a guidance model that is this patched model's own.

    Raises:
        CheckpointError, GuidanceError, TypeError, ValueError: see :func:`patch`.
    """
    if isinstance(guidance, str):
        guidance = load_model(guidance, "guidance")
    elif not isinstance(guidance, nn.Module):
        raise TypeError(f"guidance: got {type(guidance).__name__}, expected a timm name, a model or a Guidance")
    elif guidance is model:
        raise ValueError("guidance: got the model itself, expected another, smaller model")
    with torch.inference_mode(False):  # autograd refuses tensors made in inference mode
        if not isinstance(guidance, Guidance):
            own = Guidance(guidance, guidance_size)
        elif guidance_size is not None:
            raise ValueError("guidance_size: got one beside a Guidance, which has its own; expected None")
        else:
            own = copy.deepcopy(guidance)
    check_channels(own.in_chans, model.in_chans)
    return own


def _attributes(model: TimmModule, family: Family, tinydrop: TinyDrop, prepack: bool) -> InstanceAttributes:
    """Return what patching sets on the model and its modules."""
    attentions, run = family.attentions(model), run_prepacked if prepack else run_linear
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    return InstanceAttributes(
        [
            (model, "tinydrop", tinydrop),
            (model, "forward", partial(_forward, model)),
            (model, "_apply", partial(_apply, model)),
            (model, "extra_repr", partial(_extra_repr, model)),
            (model, "_replicate_for_data_parallel", _refuse_data_parallel),
            (model, "__prepare_scriptable__", _refuse_scripting),
            (model, "__reduce_ex__", partial(reduced, model)),
            *((attention, "forward", partial(family.attend, attention)) for attention in attentions),
            *((linear, "forward", partial(run, linear)) for linear in (linears(model) if is_on_cpu else [])),
        ]
    )


def is_patched(model: nn.Module) -> bool:
    """Return whether :func:`patch` has patched this model, and :func:`unpatch` has not undone it.

    Example:
        >>> tdk.is_patched(model)
        False
    """
    return isinstance(getattr(model, "tinydrop", None), TinyDrop)


@contextmanager
def patched(model: TimmModule, *arguments: Any, **options: Any) -> Iterator[TimmModule]:
    """Patch a model within the ``with`` block, and unpatch it afterwards, also after an exception.

    Args:
        model: see :func:`patch`.
        *arguments, **options: the other arguments of :func:`patch`.

    Raises:
        UnsupportedModelError, GuidanceError, PolicyFileError, ValueError, TypeError: see :func:`patch`.

    Example:
        >>> with tdk.patched(model, guidance, tdk.DropPolicy.fixed(0.5)):
        ...     answers = model(images)
        >>> tdk.is_patched(model)
        False
    """
    patch(model, *arguments, **options)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch(model)


@contextmanager
def _naming_what_is_missing(model: TimmModule) -> Iterator[None]:
    """Raise UnsupportedModelError, with timm's version, if the model lacks an attribute that timm used to have."""
    try:
        yield
    except AttributeError as error:
        raise UnsupportedModelError(f"model: {type(model).__name__} of timm {timm.__version__}: {error}") from error


@torch.inference_mode()
def _tried(family: Family, model: TimmModule) -> str | None:
    """Return how the patched model's answer on noise differs from timm's; None if it does not."""
    with in_eval_mode(model), torch.autocast(next(model.parameters()).device.type, enabled=False):
        return find_mismatch(family, model)


def _forward(model: TimmModule, x: Tensor, *masks: object, **named_masks: object) -> Tensor:
    if is_tracing() or torch.compiler.is_exporting():
        raise RuntimeError("model: a patched model cannot be traced or exported; use torch.compile, or unpatch it")
    logits: Tensor
    if model.training:
        note_training()
    if model.training or model.tinydrop.is_dense:
        logits = type(model).forward(model, x, *masks, **named_masks)
        return logits
    if any(mask is not None and mask is not False for mask in (*masks, *named_masks.values())):
        raise ValueError("attn_mask, is_causal: a patched model takes no mask, because it drops tokens")
    logits = model.tinydrop(x)
    return logits


def _apply(model: TimmModule, fn: object, recurse: bool = True) -> TimmModule:
    type(model)._apply(model, fn, recurse)
    _follow(model, model.tinydrop.guidance)
    if model.tinydrop.graphs is not None:
        model.tinydrop.graphs.clear()
    return model


def _follow(model: TimmModule, guidance: Guidance) -> None:
    """Move the guidance model to the model's device and dtype, but never to meta, where its weights would be lost."""
    weight = next(model.parameters())
    if not weight.is_meta:
        with torch.inference_mode(False):  # autograd refuses tensors made in inference mode
            guidance.to(weight.device, weight.dtype)


def _extra_repr(model: TimmModule) -> str:
    own = type(model).extra_repr(model)
    tinydrop = model.tinydrop
    told = f"tinydrop: guided by {type(tinydrop.guidance.model).__name__}, {tinydrop.policy}"
    return "\n".join(filter(None, (own, told)))


def _refuse_scripting() -> None:
    raise RuntimeError("model: a patched model cannot be scripted by torch.jit; use torch.compile, or unpatch it")


def _refuse_data_parallel() -> None:
    raise RuntimeError("a patched model cannot be replicated by DataParallel: use one process per GPU")
