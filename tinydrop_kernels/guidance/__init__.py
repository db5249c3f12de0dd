"""The guidance model, a tiny classifier. Its output decides which images exit and which patches are kept."""

from tinydrop_kernels.guidance.model import DEFAULT_GUIDANCE, Guidance, GuidanceError

__all__ = ["DEFAULT_GUIDANCE", "Guidance", "GuidanceError"]
