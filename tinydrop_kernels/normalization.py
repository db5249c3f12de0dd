"""Mean and standard deviation of a timm model's images, one number per channel."""

import math
from collections.abc import Iterable
from numbers import Real
from typing import TypeAlias

from timm.data import resolve_model_data_config

from tinydrop_kernels.ops.types import TimmModule

Normalization: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel


def normalization_of(model: TimmModule, channels: int) -> Normalization:
    """Return how images for a model are normalized: as ``patch`` was told, else as its ``pretrained_cfg`` says."""
    if hasattr(model, "tinydrop"):
        own: Normalization = model.tinydrop.normalization
        return own
    config = resolve_model_data_config(model)
    return per_channel(config["mean"], channels), per_channel(config["std"], channels)


def per_channel(statistic: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel; timm keeps three of colour for models of other channels, whose average then serves."""
    values = tuple(statistic)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


def check_statistic(name: str, values: Iterable[float], channels: int) -> tuple[float, ...]:
    """Return a mean or a standard deviation of each channel as floats.

    Args:
        name: ``"mean"`` or ``"std"``.
        values: finite numbers, one for each channel; a standard deviation is above 0.
        channels: how many.

    Raises:
        ValueError: they are not.
    """
    found = tuple(values) if isinstance(values, Iterable) else ()
    numbers = all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in found)
    if len(found) != channels or not numbers or (name == "std" and min(found) <= 0):
        above = " above 0" if name == "std" else ""
        raise ValueError(f"{name}: got {values!r}, expected {channels} finite numbers{above}, one for each channel")
    return tuple(float(value) for value in found)
