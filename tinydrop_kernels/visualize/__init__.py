"""Pictures of what a patched model kept, and a page to browse them."""

from tinydrop_kernels.visualize.pictures import as_pictures, kept_patches, saliency

__all__ = ["as_pictures", "kept_patches", "saliency"]
