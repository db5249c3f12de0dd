"""timm models from a name, a folder or a checkpoint file, with one clear error where that fails."""

import difflib
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_state_dict

from tinydrop_kernels.ops.types import TimmModule

HUB = ("huggingface.co", 443)
HUB_PATIENCE = 2.0  # seconds
TOLD_LINES, TOLD_WIDTH = 4, 300  # of an error of PyTorch's, which has a line for each of a model's parameters


class CheckpointError(RuntimeError):
    """The model's weights cannot be loaded."""


def load_model(spec: str, argument: str = "model", **options: Any) -> TimmModule:
    """A pretrained timm model in eval mode.

    Where the model hub is out of reach, weights come from its cache.

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
        with _hub_or_its_cache():
            return timm.create_model(name, pretrained=True, **options).eval()
    except Exception as error:  # timm, PyTorch and the hub raise whatever they meet
        hint = "" if file or Path(spec).exists() else "; NAME=FILE loads a local checkpoint"
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


class _HubOutOfReach(Exception):
    pass


@contextmanager
def _hub_or_its_cache() -> Iterator[None]:
    """The hub's own client offline while the hub cannot be reached: it would retry for most of a minute."""
    if constants.HF_HUB_OFFLINE or _hub_is_reachable():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _HubOutOfReach(f"the model hub ({HUB[0]}) is out of reach, and they are not in its cache") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _hub_is_reachable() -> bool:
    """Whether the hub takes a connection; believed without trying of an endpoint of one's own and behind a proxy."""
    if "HF_ENDPOINT" in os.environ or {"https", "all"} & urllib.request.getproxies().keys():
        return True
    connected = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection(HUB, timeout=HUB_PATIENCE):
                connected.set()
        except OSError:
            pass

    attempt = threading.Thread(
        target=connect, daemon=True
    )  # the timeout of a socket does not bound the look-up of names
    attempt.start()
    attempt.join(HUB_PATIENCE)
    return connected.is_set()


def _reason(error: Exception) -> str:
    if isinstance(error, _HubOutOfReach):
        return str(error)
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
