"""Loading of timm models from a name, a folder or a checkpoint file, with one error for all failures."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

from tinydrop_kernels.normalization import normalization_of, per_channel
from tinydrop_kernels.ops.types import TimmModule

HUB_HINT = "; NAME=FILE loads a local checkpoint, and HF_HUB_OFFLINE=1 uses the hub's cache without asking it"
TOLD_LINES, TOLD_WIDTH = 4, 300  # how much of an error is quoted, because PyTorch's has a line for each parameter


class CheckpointError(RuntimeError):
    """Raised if a model's weights cannot be loaded.

    Example:
        >>> try:  # doctest: +SKIP
        ...     tdk.patch(model)  # the weights of the default guidance model come from the model hub
        ... except tdk.CheckpointError as error:
        ...     print(error)
    """


def load_model(spec: str, argument: str = "model", **options: Any) -> TimmModule:
    """Return a pretrained timm model in eval mode.

    Weights from the model hub are cached. If the hub cannot be reached, the cached weights are used after a timeout.
    With ``HF_HUB_OFFLINE=1`` the cache is used at once.

    Args:
        spec: one of

            * the name of a timm model. Its weights come from the model hub.
            * a folder with ``config.json`` and weights, as ``timm.models.save_for_hf`` writes it, or a file in it.
            * ``NAME=FILE``, a timm model's name and a ``.safetensors`` or PyTorch file with its weights. The number of
              classes is read from the head's weight.
        argument: the name of the caller's argument, for error messages.
        options: passed on to ``timm.create_model``, such as ``img_size``.

    Raises:
        ValueError: there is no such model or file.
        CheckpointError: the weights cannot be loaded.

    Example:
        >>> model = tdk.checkpoints.load_model("vit_base_patch16_224.augreg_in21k_ft_in1k")  # doctest: +SKIP
        >>> model = tdk.checkpoints.load_model("vit_tiny_patch16_224=mine.safetensors")  # doctest: +SKIP
    """
    check_spec(spec, argument)
    name, _, file = spec.partition("=")
    try:
        if file:
            return timm.create_model(name, pretrained=True, **_own_weights(name, file) | options).eval()
        if Path(spec).exists():
            return timm.create_model(f"local-dir:{_folder(spec)}", pretrained=True, **options).eval()
        return timm.create_model(name, pretrained=True, **options).eval()
    except Exception as error:  # timm, PyTorch and the hub's client raise errors of many types
        hint = "" if file or Path(spec).exists() else HUB_HINT
        raise CheckpointError(
            f"{argument}: the weights of {spec!r} could not be loaded: {_reason(error)}{hint}"
        ) from error


def check_spec(spec: str, argument: str = "model") -> None:
    """Raise an error if there is no such model or file. Nothing is loaded.

    Args:
        spec, argument: as in :func:`load_model`.

    Raises:
        ValueError: there is no such model or file.
    """
    name, _, file = spec.partition("=")
    if file or not Path(spec).exists():
        architecture = name.removeprefix("timm/").split(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            hint = f"; near to it: {', '.join(near)}" if near else ""
            raise ValueError(f"{argument}: got {name!r}, expected the name of a timm model or a path{hint}")
    elif not (_folder(spec) / "config.json").is_file():
        raise ValueError(f"{argument}: there is no config.json beside {spec!r}; give it as NAME={spec}")
    if file and not Path(file).is_file():
        raise ValueError(f"{argument}: there is no file {file!r}")


def _folder(spec: str) -> Path:
    return Path(spec) if Path(spec).is_dir() else Path(spec).parent


def _own_weights(name: str, file: str) -> dict[str, Any]:
    """Return options that make timm load a file in place of its own weights, and resample positions if needed."""
    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
    first = classifier if isinstance(classifier, str) else next(iter(classifier), "")
    weight = load_state_dict(file).get(f"{first}.weight")
    classes = {} if weight is None else {"num_classes": len(weight)}
    return classes | {"pretrained_cfg_overlay": {"file": file, **classes}}


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line if len(line) <= TOLD_WIDTH else f"{line[:TOLD_WIDTH]}..." for line in lines[:TOLD_LINES]]
    if len(lines) > TOLD_LINES:
        told.append(f"and {len(lines) - TOLD_LINES} more")
    return f"{type(error).__name__}: {' '.join(told)}"


def difference_from_checkpoint(spec: str, model: TimmModule) -> str | None:
    """Return in words how a target's images differ from those that its local checkpoint is for; None if they do not.

    Image size, mean and standard deviation are compared with ``config.json`` beside the weights, if it describes the
    same architecture. The image size of ``NAME=FILE`` is that of the file's positional embedding, if it has one.

    Args:
        spec: the model's name, folder or file, as for :func:`load_model`.
        model: the model that was loaded from it, not patched.

    Example:
        >>> tdk.checkpoints.difference_from_checkpoint("vit_tiny_patch16_224", model) is None
        True
        >>> spec = "vit_small_patch14_dinov2=mine.safetensors"
        >>> print(tdk.checkpoints.difference_from_checkpoint(spec, load_model(spec)))  # doctest: +SKIP
        'mine.safetensors' is for image size 224 x 224, and the model runs with image size 518 x 518
    """
    name, _, file = spec.partition("=")
    if not (file or Path(spec).exists()):
        return None
    stated = _stated(file or spec, name.split(".")[0] if file else None)
    size = tuple(model.patch_embed.img_size)
    mean, std = normalization_of(model, model.in_chans)
    own_size = _size_of_positions(file, model) if file else None
    if own_size is None and "input_size" in stated:
        side = stated.get("model_args", {}).get("img_size", stated["input_size"][1:])
        own_size = (side, side) if isinstance(side, int) else tuple(side)
    pairs = {
        "image size": (own_size and " x ".join(map(str, own_size)), " x ".join(map(str, size))),
        "mean": (stated.get("mean") and per_channel(stated["mean"], model.in_chans), mean),
        "std": (stated.get("std") and per_channel(stated["std"], model.in_chans), std),
    }
    different = [(what, own, runs) for what, (own, runs) in pairs.items() if own and own != runs]
    if not different:
        return None
    made_for, runs_with = (", ".join(f"{row[0]} {row[column]}" for row in different) for column in (1, 2))
    return f"{file or spec!r} is for {made_for}, and the model runs with {runs_with}"


def _stated(path: str, architecture: str | None) -> dict[str, Any]:
    """Return ``config.json`` beside a checkpoint as one flat dict; an empty one if it is not for the architecture."""
    config = _folder(path) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a folder of loose files may have none, or another program's
        return {}
    if not isinstance(content, dict) or architecture not in (None, content.get("architecture")):
        return {}
    stated: dict[str, Any] = content | content.get("pretrained_cfg", {})
    return stated


def _size_of_positions(file: str, model: TimmModule) -> tuple[int, int] | None:
    """Return the image size of a file's positional embedding; None if it has none, or one of another shape."""
    stored, own = load_state_dict(file).get("pos_embed"), getattr(model, "pos_embed", None)
    if stored is None or own is None or stored.ndim != 3 or own.ndim != 3:
        return None
    if stored.shape[1] == own.shape[1]:  # also true of a grid that is not square
        height, width = model.patch_embed.img_size
        return height, width
    patches = stored.shape[1] - (own.shape[1] - model.patch_embed.num_patches)
    side = math.isqrt(max(patches, 0))
    height, width = model.patch_embed.patch_size
    return (side * height, side * width) if side * side == patches else None


def class_names(model: TimmModule, classes: int | None = None) -> list[str]:
    """Return the names of a model's classes.

    The names are those in the model's ``pretrained_cfg`` if there are any. Otherwise they are ImageNet's if the number
    of classes is that of an ImageNet subset. Otherwise they are the numbers from 0.

    Args:
        model: a timm model.
        classes: the number of classes, if the model's ``num_classes`` may be stale.

    Example:
        >>> tdk.checkpoints.class_names(model)[:3]
        ['0', '1', '2']
        >>> tdk.checkpoints.class_names(model, 1000)[207]
        'golden retriever'
    """
    classes = model.num_classes if classes is None else classes
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own and len(own) == classes:
        return list(own)
    subset = infer_imagenet_subset({"num_classes": classes}) if classes else None
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [str(index) for index in range(classes)]
