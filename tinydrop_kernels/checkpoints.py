"""timm models from a name, a folder or a checkpoint file, with one clear error where that fails."""

import difflib
from pathlib import Path

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

from tinydrop_kernels.typing import TimmModule


class CheckpointError(RuntimeError):
    """The model's weights cannot be had."""


def load_model(spec: str, **options) -> TimmModule:
    """A pretrained timm model in eval mode.

    Args:
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
    try:
        if file:
            return _from_file(_known(name), Path(file), options)
        if Path(spec).exists():
            if not (folder / "config.json").is_file():
                raise ValueError(f"model: there is no config.json beside {spec!r}; give it as NAME={spec}")
            return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()
        return timm.create_model(_known(spec), pretrained=True, **options).eval()
    except ValueError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"model: the weights of {spec!r} could not be loaded "
            f"({type(error).__name__}: {lines[0] if lines else ''}). "
            "Where the model hub is out of reach, give NAME=FILE with a local checkpoint."
        ) from error


def _known(name: str) -> str:
    if ":" not in name and not timm.is_model(name.removeprefix("timm/").split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; near to it: {', '.join(near)}" if near else ""
        raise ValueError(f"model: got {name!r}, accepted is the name of a timm model or a path{hint}")
    return name


def _from_file(name: str, file: Path, options: dict) -> TimmModule:
    if not file.is_file():
        raise ValueError(f"model: there is no file {str(file)!r}")
    state = load_state_dict(str(file))
    classifier = getattr(timm.get_pretrained_cfg(name), "classifier", None)
    first = classifier if isinstance(classifier, str) or classifier is None else classifier[0]
    weight = state.get(f"{first}.weight")
    if weight is not None:
        options = {"num_classes": len(weight)} | options
    model = timm.create_model(name, **options)
    model.load_state_dict(state)
    return model.eval()


def class_names(model: TimmModule) -> list[str]:
    """What the classes are called: the checkpoint's own names, ImageNet's where it has its classes, else numbers."""
    own = (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    if own:
        return list(own)
    subset = infer_imagenet_subset(model)
    if subset:
        return list(ImageNetInfo(subset).label_descriptions())
    return [str(index) for index in range(model.num_classes)]
