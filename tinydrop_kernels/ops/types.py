"""The types that the operators take and return.

The vocabulary follows FlashAttention where FlashAttention has a word:

* patches: the cells of an image's grid, numbered in raster order. A level is an index into a short list of grids, and
  level 0 is the dense grid.
* tokens: the rows of the packed batch. A segment holds the tokens of one image: first its prefix tokens (class,
  distillation, registers), then its kept patches. Segments follow one another without padding.
* features: the cells of the guidance model's last feature map.
* heads, head_dim, dim: as in attention.
"""

from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

# Any, because nn.Module types each attribute as Tensor | Module, and timm's modules have attributes of other types.
TimmModule: TypeAlias = Any

Grid: TypeAlias = tuple[int, int]  # rows and columns of patches

# A thousandth of a patch, subtracted before rounding up. float32 may compute patches * keep slightly too large;
# without the slack a quarter of 196 patches could become 50 instead of 49.
ROUNDING_SLACK = 1e-3

LEVELS = (1.0, 7 / 8, 3 / 4, 5 / 8, 1 / 2)  # sides of an image's possible grids, as fractions of the dense side


class Law(NamedTuple):
    """The rule that maps the guidance model's confidence ``c`` to an exit, a grid and a number of patches.

    :func:`ops.apply_law` evaluates the rule.

    Example:
        >>> law = ops.Law(tau=0.9, gamma=1.0, min_keep=0.25)
        >>> counts, levels = ops.apply_law(torch.tensor([0.3, 0.95]), [(6, 6)], law)
        >>> counts.tolist()  # the second image exits
        [24, 0]
    """

    tau: float | None  # an image exits above this confidence; None: no image exits, and the budget uses tau = 1
    gamma: float  # budget = clamp(1 - (c / tau) ** gamma, min_keep, 1), a fraction of the dense patches
    min_keep: float  # lower bound on the budget
    coarsen: float = 0.0  # share of the saving, in [0, 1], that a coarser grid makes; dropping patches makes the rest


class Saliency(NamedTuple):
    """The parts of the saliency map and their weights (:func:`ops.saliency.combine`).

    The default is Grad-CAM of the most probable class, as in the paper.

    Example:
        >>> ops.Saliency(norm=0.5)
        Saliency(classes=1, norm=0.5, center=0.0)
    """

    classes: int = 1  # number of most probable classes whose Grad-CAM is summed, weighted by their probabilities
    norm: float = 0.0  # weight of the norm of a cell's feature vector
    center: float = 0.0  # weight of a cell's closeness to the center


class Selection(NamedTuple):
    """The decisions for a batch: which images exit, and which patches the others keep.

    Example:
        >>> logits, saliency = torch.zeros(1, 4), torch.arange(4.0).view(1, 2, 2)
        >>> law = ops.Law(tau=0.9, gamma=0.0, min_keep=0.5)
        >>> selection = ops.select_from_saliency(logits, saliency, [(2, 2)], law)
        >>> selection.indices.tolist(), selection.counts.tolist()
        ([[2, 3, -1, -1]], [2])
    """

    indices: Tensor  # int32 (batch, patches): kept patches in raster order on the image's own grid, then -1
    counts: Tensor  # int32 (batch,): number of kept patches, 0 for an image that exits
    levels: Tensor  # int32 (batch,): position of the image's own grid in the list of grids
    confidence: Tensor  # float32 (batch,): max softmax of the guidance logits
    saliency: Tensor  # float32 (batch, patches): the scores by which patches were ranked, on the own grid, then 0


class Packed(NamedTuple):
    """The layout of the packed tokens, in FlashAttention's conventions.

    A patched model passes the layout through timm's blocks as ``attn_mask``. All code that works token by token
    therefore stays timm's own.

    Example:
        >>> counts, levels = torch.tensor([3, 0, 2]).int(), torch.tensor([0, 0, 0]).int()
        >>> packed, parts = ops.pack(counts, levels, [(2, 2)], num_prefix_tokens=1)
        >>> packed.cu_seqlens.tolist(), packed.max_seqlen, packed.total
        ([0, 4, 7], 4, 7)
    """

    cu_seqlens: Tensor  # int32 (segments + 1,): first row of each segment, then the total
    max_seqlen: int  # rows of the longest segment
    total: int  # rows of the packed tokens
    # int32 (total,): each row's patch on its own grid, -1 for a prefix token (:func:`ops.patch_positions`). None unless
    # the model family needs positions.
    positions: Tensor | None = None


class Part(NamedTuple):
    """The images of a batch that share a grid. They are embedded together and are neighbours in the packed batch.

    Example:
        >>> counts, levels = torch.tensor([3, 1, 2]).int(), torch.tensor([0, 1, 0]).int()
        >>> packed, parts = ops.pack(counts, levels, [(4, 4), (2, 2)], num_prefix_tokens=1)
        >>> [(part.grid, part.images.tolist(), part.total) for part in parts]
        [((4, 4), [0, 2], 7), ((2, 2), [1], 2)]
    """

    grid: Grid
    images: Tensor  # int32 (n,): positions of the images in the batch
    cu_seqlens: Tensor  # int32 (n + 1,): first row of each segment, counted from the part's first row, then the total
    total: int  # rows of the part


class RelativeBias(NamedTuple):
    """A relative position bias, as BEiT and Swin add it to the scores.

    :func:`ops.attention_reference.relative_position_index` gives the row of ``table`` for a query and a key. Kernels
    look the bias up; only the reference materialises it.

    Example:
        >>> query, cu_seqlens = torch.randn(4, 1, 8), torch.tensor([0, 4]).int()
        >>> bias = ops.RelativeBias(torch.zeros(9, 1), torch.arange(4).int(), grid_size=(2, 2))
        >>> ops.varlen_attention(query, query, query, cu_seqlens, cu_seqlens, 4, 4, bias=bias).shape
        torch.Size([4, 1, 8])
    """

    # floating (distances, heads), any strides: (2 rows - 1)(2 columns - 1) distances, 3 more if there is a class token
    table: Tensor
    # int32 (total,): each token's patch on the grid, in raster order; a negative number is the class token, which needs
    # the three further entries of the table. The values are not checked, because reading them would synchronise.
    positions: Tensor
    grid_size: tuple[int, int]  # rows and columns of the patch grid
