"""Pictures of the patches that a patched model kept, and an HTML page to browse them."""

from tinydrop_kernels.visualize.pictures import as_pictures, kept_patches, saliency

__all__ = ["as_pictures", "kept_patches", "saliency"]
