"""The tiny classifier that decides which images exit and which patches matter."""

from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE, Guidance, GuidanceError

__all__ = ["DEFAULT_GUIDANCE", "Guidance", "GuidanceError"]
