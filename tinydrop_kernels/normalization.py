"""Mean and standard deviation that a timm model's images are normalised with, one number per channel."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import TypeAlias

from timm.data import resolve_model_data_config

from tinydrop_kernels.ops.types import TimmModule

Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def normalization_of(model: TimmModule, channels: int) -> Normalization:
    """Return the mean and the standard deviation of a model's images.

    They are those given to ``patch`` if the model is patched, otherwise those of its ``pretrained_cfg``.
    """
    if hasattr(model, "tinydrop"):
        own: Normalization = model.tinydrop.normalization
        return own
    config = resolve_model_data_config(model)
    return per_channel(config["mean"], channels), per_channel(config["std"], channels)


def per_channel(statistic: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel.

    timm gives three values, for RGB, even to a model with another number of channels. Such a model gets their average
    in each channel.
    """
    values = tuple(statistic)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def check_statistic(name: str, values: Iterable[float], channels: int) -> tuple[float, ...]:
    """Return the mean or the standard deviation of each channel as floats.

    Args:
        name: ``"mean"`` or ``"std"``.
        values: one finite number for each channel. Standard deviations must be above 0.
        channels: number of channels.

    Raises:
        ValueError: the values are not such numbers.
    """
    found = tuple(values) if isinstance(values, Iterable) else ()
    numbers = all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in found)
    if len(found) != channels or not numbers or (name == "std" and min(found) <= 0):
        above = " above 0" if name == "std" else ""
        raise ValueError(f"{name}: got {values!r}, expected {channels} finite numbers{above}, one for each channel")
    return tuple(float(value) for value in found)
