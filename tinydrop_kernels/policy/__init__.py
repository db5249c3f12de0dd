"""How much each image keeps. The calibrated kind and its file are in :mod:`tinydrop_kernels.policy.calibrated`."""

from tinydrop_kernels.policy.drop import DropPolicy

__all__ = ["DropPolicy"]
