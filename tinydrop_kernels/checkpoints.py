"""timm models from a name, a folder or a checkpoint file, with one clear error where that fails."""

import difflib
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

from tinydrop_kernels.ops.types import TimmModule

HUB_HINT = "; NAME=FILE loads a local checkpoint, and HF_HUB_OFFLINE=1 uses the hub's cache without asking it"
TOLD_LINES, TOLD_WIDTH = 4, 300  # of an error of PyTorch's, which has a line for each of a model's parameters


class CheckpointError(RuntimeError):
    """The model's weights cannot be loaded."""


def load_model(spec: str, argument: str = "model", **options: Any) -> TimmModule:
    """A pretrained timm model in eval mode.

    Weights from the model hub are kept in its cache. They come from there if the hub cannot be reached; its client
    tries for a while first, unless ``HF_HUB_OFFLINE=1`` is set.

    Args:
        spec: one of

            * the name of a timm model: its weights come from the model hub;
            * a folder with ``config.json`` and weights, as ``timm.models.save_for_hf`` writes it, or a file in it;
            * ``NAME=FILE``: the timm model of that name with the weights in a ``.safetensors`` or PyTorch file, whose
              head tells the number of classes.
        argument: what the caller calls it, for the errors.
        options: passed on to ``timm.create_model``, such as ``img_size``.

    Raises:
        ValueError: there is no such model or file.
        CheckpointError: the weights cannot be loaded.
    """
    check_spec(spec, argument)
    name, _, file = spec.partition("=")
    try:
        if file:
            return timm.create_model(name, pretrained=True, **_own_weights(name, file) | options).eval()
        if Path(spec).exists():
            return timm.create_model(f"local-dir:{_folder(spec)}", pretrained=True, **options).eval()
        return timm.create_model(name, pretrained=True, **options).eval()
    except Exception as error:  # timm, PyTorch and the hub raise whatever they meet
        hint = "" if file or Path(spec).exists() else HUB_HINT
        raise CheckpointError(
            f"{argument}: the weights of {spec!r} could not be loaded: {_reason(error)}{hint}"
        ) from error


def check_spec(spec: str, argument: str = "model") -> None:
    """Whether there is such a model or file, found out without loading anything; the arguments of :func:`load_model`.

    Raises:
        ValueError: there is none.
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
    """Options that make timm load a file in place of its own weights, fitted to the model as it fits its own."""
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


def class_names(model: TimmModule, classes: int | None = None) -> list[str]:
    """Return the names of the classes: the checkpoint's own, ImageNet's where it has its classes, else numbers.

    Args:
        model: the model.
        classes: how many it answers, where that may not be its ``num_classes``.
    """
    classes = model.num_classes if classes is None else classes
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own and len(own) == classes:
        return list(own)
    subset = infer_imagenet_subset({"num_classes": classes}) if classes else None
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [str(index) for index in range(classes)]
