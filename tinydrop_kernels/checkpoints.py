"""timm models from a name, a folder or a checkpoint file, with one clear error where that fails."""

import difflib
from pathlib import Path

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

from tinydrop_kernels.aliases import TimmModule


class CheckpointError(RuntimeError):
    """The model's weights cannot be had."""


def load_model(spec: str, argument: str = "model", **options) -> TimmModule:
    """A pretrained timm model in eval mode.

    Args:
        argument: what the caller calls it, for the errors.
        spec: one of

            * the name of a timm model: its weights come from the model hub;
            * a folder with ``config.json`` and weights, as ``timm.models.save_for_hf`` writes it, or a file in it;
            * ``NAME=FILE``: the timm model of that name with the weights in a ``.safetensors`` or PyTorch file, whose
              head tells the number of classes.
        options: passed on to ``timm.create_model``, such as ``img_size``.

    Raises:
        ValueError: there is no such model or file.
        CheckpointError: the weights cannot be loaded, as where the model hub is out of reach.
    """
    name, _, file = spec.partition("=")
    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    if file or not Path(spec).exists():
        architecture = name.removeprefix("timm/").split(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
            hint = f"; near to it: {', '.join(near)}" if near else ""
            raise ValueError(f"{argument}: got {name!r}, accepted is the name of a timm model or a path{hint}")
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{argument}: there is no config.json beside {spec!r}; give it as NAME={spec}")
    if file and not Path(file).is_file():
        raise ValueError(f"{argument}: there is no file {file!r}")
    try:
        if file:
            options = _own_weights(name, file) | options
        elif Path(spec).exists():
            name = f"local-dir:{folder}"
        return timm.create_model(name, pretrained=True, **options).eval()
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"{argument}: the weights of {spec!r} could not be loaded "
            f"({type(error).__name__}: {lines[0] if lines else ''}). "
            "Where the model hub is out of reach, give NAME=FILE with a local checkpoint."
        ) from error


def _own_weights(name: str, file: str) -> dict:
    """Options that make timm load a file in place of its own weights, fitted to the model as it fits its own."""
    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None) or ()
    first = classifier if isinstance(classifier, str) else next(iter(classifier), "")
    weight = load_state_dict(file).get(f"{first}.weight")
    classes = {} if weight is None else {"num_classes": len(weight)}
    return classes | {"pretrained_cfg_overlay": {"file": file, **classes}}


def class_names(model: TimmModule) -> list[str]:
    """What the classes are called: the checkpoint's own names, ImageNet's where it has its classes, else numbers."""
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [str(index) for index in range(model.num_classes)]
