"""``patch`` and ``unpatch``: a timm model made to drop tokens in place, and put back exactly as it was.

Nothing is replaced in the model's tree: a few attributes are set on instances, each remembered with what was set, and
removed again. The guidance model is not a submodule, so the ``state_dict`` is untouched. The attributes are
``functools.partial``: a bound method would pickle as a reference by name to the class's own method and load back dense.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from tinydrop_kernels.checkpoints import load_model
from tinydrop_kernels.engine import TinyDrop
from tinydrop_kernels.engine.attributes import InstanceAttributes, reduced
from tinydrop_kernels.engine.checks import check_patched
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

    The model is called as before and answers in the same shape and dtype; ``model.tinydrop`` tells what it did. Where
    the policy can exit, blend or look twice, as by default, every row is log-probabilities, of the same softmax and
    argmax as logits. With any other policy the answer is the target's own logits, untouched. In ``train()`` mode the
    model runs dense and answers timm's logits. ``forward_features``, ``forward_head`` and ``forward_intermediates``
    stay timm's own, dense.

    What is computed from weights is kept between calls, until they change. A change through ``.data`` is not seen in a
    process that has not trained: call ``model.tinydrop.refresh()`` after it, and when training is over.

    Args:
        model: a supported timm model (:mod:`tinydrop_kernels.families`).
        guidance: the tiny classifier: a timm name or a checkpoint (:func:`checkpoints.load_model`), a timm model, or
            a :class:`Guidance`. A copy of it is taken, moved to the model's device and dtype, and follows the model
            from then on. It must know the same classes unless the policy mixes no answers.
        policy: a :class:`DropPolicy`; by default ``DropPolicy()``, which neither exits, blends nor looks twice where
            the model has no classes, one, or many labels. The head itself is asked for its classes, not
            ``num_classes``; an ``nn.Identity`` has none. Or what ``calibrate`` found, or the file of it: then the
            guidance model is fed images of the size that was found best, and other models than those it was found with
            are refused.
        guidance_size: size of the images that the guidance model is fed, if not its own: one number, or height and
            width. Less costs less and sees less: what that does to accuracy hangs on the images.
        compile: run the guidance model and the target's blocks through ``torch.compile``, for any number of images and
            tokens. The first batch of several images and the first of one then take a minute or more each.
        prepack: of a model on CPU, keep the weights of the blocks' linear layers in oneDNN's own layout too: faster,
            the more so the fewer tokens there are, for as much memory again.
        graphs: experimental, since no GPU has run it yet. On a GPU, without gradients and autocast, replay guidance,
            selection and packing, and the target's blocks and head, from CUDA graphs: small batches do not wait for the
            host (:mod:`tinydrop_kernels.engine.cuda_graphs`). The first two calls of a kind take longer;
            ``str(model.tinydrop.graphs)`` tells how many were replayed.
        multi_label: the model's head is one of sigmoids, whose answers are read class by class. Only policies that
            neither exit, blend nor look twice are taken then, now and later.
        mean, std: how the images come normalised, one number for each channel, where that is not as the model's
            ``pretrained_cfg`` says. From it the guidance model's own normalisation is made. If it is wrong, the
            guidance model sees images too bright or too pale: exits, blends and the choice of patches suffer, and the
            target itself does not notice.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: the model, or something in it, is not supported; also found out by trying the patched
            model on a little noise, hooks and all.
        CheckpointError: the guidance model's weights cannot be loaded.
        GuidanceError: the guidance model has no classes or no feature map, or does not take the size.
        PolicyFileError: the policy's file cannot be read, or it is for another model or guidance.
        ValueError, TypeError: an argument out of range; a model that is patched already; guidance with other classes; a
            policy that mixes answers for a multi-label model; prepacking of a model that was made in inference mode;
            graphs of a model that is not on a GPU, or without Triton.
    """
    if isinstance(getattr(model, "tinydrop", None), TinyDrop):
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
                "model: its blocks are those of a model that is patched already, or copies of them; unpatch that one "
                "first, or build this one anew"
            )
        classes = count_classes(model)
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
    if isinstance(guidance, str):
        guidance = load_model(guidance, "guidance")
    elif not isinstance(guidance, nn.Module):
        raise TypeError(f"guidance: got {type(guidance).__name__}, expected a timm name, a model or a Guidance")
    elif guidance is model:
        raise ValueError("guidance: got the model itself, expected another, smaller model")
    if prepack and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "prepack: got a model made in inference mode, whose weights' changes go unseen; make it outside"
        )
    device = next(model.parameters()).device
    if graphs and not has_graphs(device.type):
        raise ValueError(f"graphs: got a model on {device}, expected one on a GPU that has CUDA graphs; move it first")
    if graphs and not HAS_TRITON:
        raise ValueError("graphs: Triton is not installed, without which every layer reads back; install it")
    with torch.inference_mode(False):  # autograd refuses tensors made in inference mode
        if not isinstance(guidance, Guidance):
            guidance = Guidance(guidance, guidance_size)
        elif guidance_size is not None:
            raise ValueError("guidance_size: got one beside a Guidance, which has its own; expected None")
        else:
            guidance = copy.deepcopy(guidance)
        if calibrated is not None:
            calibrated.check(fingerprint_of(model, classes), guidance.fingerprint)
            guidance = guidance.at_size(calibrated.input_size)
    if guidance.in_chans != model.in_chans:
        raise ValueError(f"guidance: it sees {guidance.in_chans} channels and the model {model.in_chans}")
    guidance.compiled = guidance.compiled or compile
    recorded = Graphs() if graphs else None
    tinydrop = TinyDrop(model, guidance.eval(), policy, compile, recorded, multi_label, normalization)
    _follow(model, guidance)
    run = run_prepacked if prepack else run_linear
    tinydrop.attributes = InstanceAttributes(
        [
            (model, "tinydrop", tinydrop),
            (model, "forward", partial(_forward, model)),
            (model, "_apply", partial(_apply, model)),
            (model, "extra_repr", partial(_extra_repr, model)),
            (model, "_replicate_for_data_parallel", _refuse_data_parallel),
            (model, "__prepare_scriptable__", _refuse_scripting),
            (model, "__reduce_ex__", partial(reduced, model)),
            *((attention, "forward", partial(family.attend, attention)) for attention in family.attentions(model)),
            *((linear, "forward", partial(run, linear)) for linear in (linears(model) if device.type == "cpu" else [])),
        ]
    )
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
            f"{type(model).__name__} with {type(model.patch_embed).__name__} keeps its dense grid, since its stem or "
            "its windows fit images of no other size: besides exits, only what the policy drops is saved (coarsen < 1)",
            stacklevel=2,
        )
    return model


@contextmanager
def dense(model: TimmModule) -> Iterator[TimmModule]:
    """Run a patched model as timm's own within the ``with`` block, in this thread.

    For hooks that want timm's shapes, profilers and summaries: nothing is dropped and no image exits, but modules are
    called as timm calls them.

    Raises:
        ValueError: the model is not patched.

    Example:
        >>> with tinydrop_kernels.dense(model):
        ...     attention_maps = record(model, images)
    """
    check_patched(model)
    tinydrop = model.tinydrop
    before, tinydrop.is_dense = tinydrop.is_dense, True
    try:
        yield model
    finally:
        tinydrop.is_dense = before


def unpatch(model: TimmModule) -> TimmModule:
    """Put a patched model back exactly as it was, and return it. What was set on it since then stays.

    Raises:
        ValueError: the model is not patched, or only a module inside it is.
    """
    tinydrop = vars(model).get("tinydrop") if isinstance(model, nn.Module) else None
    if not isinstance(tinydrop, TinyDrop):
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            if isinstance(vars(module).get("tinydrop"), TinyDrop):
                raise ValueError(f"model: the patched model is inside this {type(model).__name__}; unpatch its {name}")
        raise ValueError("model: it is not patched")
    tinydrop.attributes.remove_from()
    return model


@contextmanager
def _naming_what_is_missing(model: TimmModule) -> Iterator[None]:
    """A timm that has renamed a part, or a model that has lost one, is refused and not half run."""
    try:
        yield
    except AttributeError as error:
        raise UnsupportedModelError(f"model: {type(model).__name__} of timm {timm.__version__}: {error}") from error


@torch.inference_mode()
def _tried(family: Family, model: TimmModule) -> str | None:
    """The trial on noise, in eval mode without autocast."""
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
        raise ValueError("attn_mask, is_causal: a patched model has no dense sequence they could refer to")
    logits = model.tinydrop(x)
    return logits


def _apply(model: TimmModule, fn: object, recurse: bool = True) -> TimmModule:
    type(model)._apply(model, fn, recurse)
    _follow(model, model.tinydrop.guidance)
    if model.tinydrop.graphs is not None:
        model.tinydrop.graphs.clear()
    return model


def _follow(model: TimmModule, guidance: Guidance) -> None:
    """Move guidance to the model's device and dtype; not to the meta device, from which no weights come back."""
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
