"""Search for the cheapest policy that keeps a model's accuracy on given images, with a statistical certificate."""

from tinydrop_kernels.calibration.answers import COSTS, Answers, calibrate, gather

__all__ = ["COSTS", "Answers", "calibrate", "gather"]
