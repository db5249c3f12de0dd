"""Fingerprints that identify a model, so that a policy file can be checked against the models it is used with."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from tinydrop_kernels.ops.types import TimmModule


class Fingerprint(NamedTuple):
    """The identity of a model."""

    name: str  # timm's name with its tag, or the name of the class
    classes: int
    weights: str  # 16 hexadecimal digits of a hash of the weights
    dtype: str


def fingerprint_of(model: TimmModule, classes: int) -> Fingerprint:
    """Return the fingerprint of a timm model.

    Weights are rounded to bfloat16 before they are hashed, so a model and its copy in bfloat16 have the same hash.

    Args:
        model: a timm model.
        classes: the number of its classes, because its ``num_classes`` may be stale.

    Raises:
        ValueError: the model is on the meta device, and so has no weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError("model: it is on the meta device and has no weights to take a fingerprint of")
        if tensor.is_floating_point():
            tensor = tensor.bfloat16().view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Fingerprint(name_of(model), classes, digest.hexdigest()[:16], dtype)


def name_of(model: TimmModule) -> str:
    """Return timm's name of a model with its tag; the name of its class if timm did not build it."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return ".".join(filter(None, (config.get("architecture"), config.get("tag")))) or type(model).__name__
