"""The interface that a timm family implements so that its models can be patched."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule


class UnsupportedModelError(TypeError):
    """The error for a model that cannot be patched. Its message names the unsupported part.

    Example:
        >>> resnet = timm.create_model("test_resnet", num_classes=10).eval()
        >>> tdk.patch(resnet, guidance)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        tinydrop_kernels.families.base.UnsupportedModelError: model: got ResNet, supported: VisionTransformer...
    """


class Family(ABC):
    """The stages of one timm family, for packed tokens and for timm's dense ones.

    An instance has no state, so every method takes the model. Images have the shape ``(n, channels, height, width)``
    and packed tokens ``(total, dim)``. ``indices`` and ``cu_seqlens`` are those of :func:`ops.embed_tokens`.

    Attributes:
        name: timm's classes and the models that use them, for messages.
        reads_positions: whether :meth:`encode` needs each token's position on its grid (``Packed.positions``).
    """

    name: str
    reads_positions: bool = False

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Return whether the model's class belongs to this family."""

    @abstractmethod
    def unsupported_reason(self, model: TimmModule) -> str | None:
        """Return a description of the first part that is not supported, or None if every part is supported.

        A part that the packed forward would silently skip counts as not supported. This method is called when a model
        is patched, and again when something in a patched model has changed.
        """

    @abstractmethod
    def settings(self, model: TimmModule) -> tuple[Any, ...]:
        """Return the attribute values that :meth:`unsupported_reason` depends on. They are compared at every call."""

    @abstractmethod
    def attentions(self, model: TimmModule) -> list[nn.Module]:
        """Return the attention modules whose forward is replaced by :meth:`attend`."""

    def attend(self, attention: TimmModule, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of an attention module.

        The tokens are packed if :meth:`encode` passed their layout. Otherwise timm's own forward runs.
        """
        raise NotImplementedError(f"no attention of {self.name} is replaced")

    def check_images(self, model: TimmModule, images: Tensor) -> None:
        """Raise ValueError if the model does not accept images of this size."""
        height, width = images.shape[-2:]
        patch = model.patch_embed
        if getattr(model, "dynamic_img_size", False):
            rows, columns = patch.feat_ratio(as_scalar=False)
            whole = patch.dynamic_img_pad or not (height % rows or width % columns)
            if not (height and width and whole):
                raise ValueError(f"images: got {height} x {width}, expected multiples of the patch {rows} x {columns}")
        elif (height, width) != tuple(patch.img_size):
            raise ValueError(f"images: got {height} x {width}, expected {patch.img_size[0]} x {patch.img_size[1]}")

    @abstractmethod
    def grid_size(self, model: TimmModule, images: Tensor) -> Grid:
        """Return the rows and columns of the patch grid of these images."""

    @abstractmethod
    def num_prefix_tokens(self, model: TimmModule) -> int:
        """Return the number of tokens that each image has in front of its patches, such as the class token."""

    @abstractmethod
    def levels(self, model: TimmModule, grid: Grid) -> list[Grid]:
        """Return the grids that an image may have, the dense grid first.

        The list holds the dense grid alone if the model supports no coarser grid.
        """

    @abstractmethod
    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        """Return the height and width of a patch in pixels, for a model with several :meth:`levels`."""

    @abstractmethod
    def embed(
        self, model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
    ) -> Tensor:
        """Return the packed tokens ``(total, dim)`` that enter the first block. All images have this grid."""

    @abstractmethod
    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        """Return the tokens after the blocks and the final norm, and their layout.

        Tokens that the head does not read may be left out, unless ``read_all`` is set.
        """

    @abstractmethod
    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        """Return the logits ``(segments, classes)`` for the tokens that :meth:`encode` returned."""

    @abstractmethod
    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        """Return timm's own tokens ``(n, tokens, dim)`` that enter the first block."""

    @abstractmethod
    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """Return the output of timm's own blocks and final norm for tokens ``(n, tokens, dim)``."""

    @abstractmethod
    def dense_classify(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """Return timm's own logits for the tokens that :meth:`dense_encode` returned."""

    def trial_patches(self, model: TimmModule, grid: Grid) -> int:
        """Return how many patches the trial passes to :meth:`dense_encode`, from the first on. All by default."""
        return grid[0] * grid[1]

    @abstractmethod
    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        """Return the FLOPs of a packed forward. ``counts`` holds the kept patches per image, 0 for one that exits."""

    @abstractmethod
    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        """Return the FLOPs of timm's own forward for this number of images."""
