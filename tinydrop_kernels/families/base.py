"""What a timm family must offer to be patched."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule


class UnsupportedModelError(TypeError):
    """The model cannot be patched; the message says why and what can."""


class Family(ABC):
    """One timm family, stage by stage, on a ragged batch.

    An instance has no state: every method takes the model. Shapes: images ``(n, channels, height, width)``, tokens
    ``(total, dim)``; ``indices`` and ``cu_seqlens`` as in :func:`ops.embed_tokens`.

    Attributes:
        name: timm's classes and the models that are built of them, for messages.
        reads_positions: whether :meth:`encode` asks where on its grid each token is (``Packed.positions``).
    """

    name: str
    reads_positions: bool = False

    @abstractmethod
    def accepts(self, model: nn.Module) -> bool:
        """Return whether the model is of this family at all."""

    @abstractmethod
    def unsupported_reason(self, model: TimmModule) -> str | None:
        """Describe what of a model of the family is not supported, or would be passed over in silence.

        None if nothing is. Asked when the model is patched, and when something in a patched model has changed.
        """

    @abstractmethod
    def settings(self, model: TimmModule) -> tuple[Any, ...]:
        """Return the attribute values that :meth:`unsupported_reason` looks at; compared at every call."""

    @abstractmethod
    def attentions(self, model: TimmModule) -> list[nn.Module]:
        """Return the modules whose forward :meth:`attend` stands in for."""

    def attend(self, attention: TimmModule, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention's output: of packed tokens if :meth:`encode` says where they are, else timm's own."""
        raise NotImplementedError(f"no attention of {self.name} is replaced")

    def check_images(self, model: TimmModule, images: Tensor) -> None:
        """Raise ValueError if the model would refuse the size of the images."""
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
        """Return rows and columns of the patch grid of these images."""

    @abstractmethod
    def num_prefix_tokens(self, model: TimmModule) -> int:
        """Return the number of tokens of each image in front of its patches."""

    @abstractmethod
    def levels(self, model: TimmModule, grid: Grid) -> list[Grid]:
        """Return the grids that an image of this dense one may have, dense first; it alone if others make no sense."""

    @abstractmethod
    def patch_size(self, model: TimmModule) -> tuple[int, int]:
        """Return height and width of a patch of a model with several :meth:`levels`."""

    @abstractmethod
    def embed(
        self, model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
    ) -> Tensor:
        """Return packed tokens ``(total, dim)`` as they enter the first block, of images that all have this grid."""

    @abstractmethod
    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        """Run the blocks and the final norm; return what the head reads of the tokens, or all, and where they are."""

    @abstractmethod
    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        """Return pool and head of what :meth:`encode` gives: ``(segments, classes)``."""

    @abstractmethod
    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        """Return timm's own ``(n, tokens, dim)`` as they enter the first block."""

    @abstractmethod
    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """Return timm's own blocks and norm of ``(n, tokens, dim)``, in the same shape."""

    @abstractmethod
    def dense_classify(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """Return timm's own pool and head of what :meth:`dense_encode` gives."""

    def trial_patches(self, model: TimmModule, grid: Grid) -> int:
        """Return how many patches of the grid, the first ones, :meth:`dense_encode` must have: all by default."""
        return grid[0] * grid[1]

    @abstractmethod
    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        """Return the FLOPs of images of this grid that keep so many patches each; 0 is an image that exits."""

    @abstractmethod
    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        """Return the FLOPs of timm's own forward of so many images."""
