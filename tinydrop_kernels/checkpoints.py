"""Loading of timm models from a name, a folder or a checkpoint file, with one error for all failures."""

import difflib
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

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
