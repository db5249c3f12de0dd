"""Which model it is: what a policy file names, and is held against."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from tinydrop_kernels.ops.types import TimmModule


class Fingerprint(NamedTuple):
    """Which model it was."""

    name: str
    classes: int
    weights: str  # fingerprint
    dtype: str


def fingerprint_of(model: TimmModule, classes: int) -> Fingerprint:
    """Return name, classes, weights and dtype of a timm model.

    The fingerprint is of the weights rounded to bfloat16: a model and its copy in bfloat16 are one model.

    Args:
        model: the model.
        classes: how many it answers, since its ``num_classes`` may be stale.

    Raises:
        ValueError: the model is on the meta device, and has no weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError("model: it is on the meta device and has no weights that could be told from others")
        if tensor.is_floating_point():
            tensor = tensor.bfloat16().view(torch.int16)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
    config = getattr(model, "pretrained_cfg", None) or {}
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag")))) or type(model).__name__
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Fingerprint(name, classes, digest.hexdigest()[:16], dtype)
