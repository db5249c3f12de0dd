"""Policies, which decide how much of each image is kept. Calibrated policies and their files are in ``calibrated``."""

from tinydrop_kernels.policy.drop import DropPolicy

__all__ = ["DropPolicy"]
