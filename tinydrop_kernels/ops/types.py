"""What the operators hand to one another.

The vocabulary, FlashAttention's where it has a word for it:

* patches: the cells of an image's grid, numbered in raster order; a level is one of a short list of grids, dense first;
* tokens: the rows of the packed batch. A segment, one image's tokens, is its prefix tokens (class, distillation,
  registers) and its kept patches in raster order; segments lie behind one another, without padding;
* features: the cells of the guidance model's last feature map;
* heads, head_dim, dim: as in attention and everywhere else.
"""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

# nn.Module types each of its attributes as Tensor | Module, which fits none of timm's.
TimmModule: TypeAlias = Any

Grid: TypeAlias = tuple[int, int]  # rows and columns of patches

# A thousandth of a token: forgives the rounding of patches * keep in float32, so that a quarter of 196 is 49, not 50.
ROUNDING_SLACK = 1e-3

LEVELS = (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2)  # sides of the grids that an image may have, over the dense one's


class Law(NamedTuple):
    """From the guidance model's confidence ``c`` to an exit, a grid and a number of patches (:func:`ops.apply_law`)."""

    tau: float | None  # exit above this confidence; None never exits, and the budget is taken with tau = 1
    gamma: float  # budget = clamp(1 - (c / tau) ** gamma, min_keep, 1), a fraction of the dense patches
    min_keep: float
    coarsen: float = 0.0  # the share of the cut, in [0, 1], that a coarser grid takes; dropping takes the rest


class Saliency(NamedTuple):
    """What makes a patch salient (:func:`ops.saliency.combine`); by default Grad-CAM of one class, as in the paper."""

    classes: int = 1  # Grad-CAM of so many of the most probable classes, weighted by their probabilities
    norm: float = 0.0  # weight of the norm of a cell's feature vector
    center: float = 0.0  # weight of a cell's closeness to the center


class Selection(NamedTuple):
    """What was decided for a batch."""

    indices: Tensor  # int32 (batch, patches): kept patches in raster order on the image's own grid, then -1
    counts: Tensor  # int32 (batch,): number of kept patches, 0 for an image that exits
    levels: Tensor  # int32 (batch,): which grid of the list is the image's own
    confidence: Tensor  # float32 (batch,): max softmax of the guidance logits
    saliency: Tensor  # float32 (batch, patches): what the ranking was made on, on the image's own grid, then 0


class Packed(NamedTuple):
    """Where each image's tokens lie among the packed ones; FlashAttention's conventions.

    It travels through timm's blocks in the place of ``attn_mask``, as ``torch.nn.attention.bias`` does, so that
    everything that works token by token stays timm's own code.
    """

    cu_seqlens: Tensor  # int32 (segments + 1,): where each segment begins, and the total
    max_seqlen: int  # longest segment
    total: int  # rows of the packed tokens
    positions: Tensor | None = None  # int32 (total,): each row's patch on its own grid, -1 for a prefix token; made
    # for the families that ask for it (:func:`ops.patch_positions`)


class Part(NamedTuple):
    """The images of a batch that share a grid: they are embedded together, and are neighbours in the packed batch."""

    grid: Grid
    images: Tensor  # int32 (n,): their places in the batch
    cu_seqlens: Tensor  # int32 (n + 1,): where each segment begins, counted from the part's first row
    total: int  # rows of the part


class RelativeBias(NamedTuple):
    """A relative position bias, as BEiT and Swin add it to the scores; looked up in the kernel, never materialised.

    Its row for a query and a key is :func:`ops.attention_reference.relative_position_index` of their positions.
    """

    table: Tensor  # floating (distances, heads), any strides; (2 rows - 1)(2 columns - 1) distances, 3 more for BEiT's
    positions: Tensor  # int32 (total,): each token's patch on the grid, in raster order; negative: the class token, for
    # which the table must have its three entries. Not checked: looking would synchronise
    grid_size: tuple[int, int]  # rows and columns of the patch grid
