"""What a timm family must offer to be patched, and the trial that every patch goes through."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydrop_kernels import ops
from tinydrop_kernels.ops.packing import pack_alike
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule
from tinydrop_kernels.torch_internals import ieee_float32


class UnsupportedModelError(TypeError):
    """The model cannot be patched; the message says why and what can."""


class Family(Protocol):
    """A module of functions: one timm family, stage by stage, on a ragged batch.

    Shapes: images ``(n, channels, height, width)``, tokens ``(total, dim)``; ``indices`` and ``cu_seqlens`` as in
    :func:`ops.embed_tokens`.
    """

    NAME: str
    READS_POSITIONS: bool  # whether :meth:`encode` asks where on its grid each token is (``Packed.positions``)

    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this family at all."""

    def unsupported_reason(self, model: TimmModule) -> str | None:
        """What of an unpatched model of the family is not supported, or None."""

    def find_change(self, model: TimmModule) -> str | None:
        """What of a patched model is no longer what was patched and would be passed over in silence, or None.

        Asked at every call, so it looks at attributes alone.
        """

    def attentions(self, model: TimmModule) -> list[nn.Module]:
        """The modules that must know about segments; :meth:`attend` stands in for their forward."""

    def attend(self, attention: TimmModule, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The attention's forward: on packed tokens when :meth:`encode` says where they are, else timm's own."""

    def check_images(self, model: TimmModule, images: Tensor) -> None:
        """Raise ValueError where the model would refuse the size of the images."""

    def grid_size(self, model: TimmModule, images: Tensor) -> Grid:
        """Rows and columns of the patch grid of these images."""

    def num_prefix_tokens(self, model: TimmModule) -> int:
        """Tokens of each image in front of its patches."""

    def patch_size(self, model: TimmModule) -> tuple[int, int] | None:
        """Height and width of a patch, or None where images of another grid make no sense to the model."""

    def embed(
        self, model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
    ) -> Tensor:
        """Packed tokens ``(total, dim)`` as they enter the first block, of images that all have this grid."""

    def encode(
        self, model: TimmModule, tokens: Tensor, packed: Packed, parts: list[Part], read_all: bool = False
    ) -> tuple[Tensor, Packed]:
        """The blocks and the final norm: what the head reads of the tokens, or all of them, and where they are."""

    def classify(self, model: TimmModule, tokens: Tensor, packed: Packed) -> Tensor:
        """Pool and head, of what :meth:`encode` gives: ``(segments, classes)``."""

    def dense_embed(self, model: TimmModule, images: Tensor) -> Tensor:
        """timm's own: ``(n, tokens, dim)`` as they enter the first block."""

    def dense_encode(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """timm's own blocks and norm, ``(n, tokens, dim)`` to the same."""

    def dense_classify(self, model: TimmModule, tokens: Tensor) -> Tensor:
        """timm's own pool and head."""

    def trial_patches(self, model: TimmModule, grid: Grid) -> int:
        """How many patches of the grid, the first ones, :meth:`dense_encode` must have: all where it counts on them."""

    def flops(self, model: TimmModule, counts: list[int], grid: Grid) -> int:
        """FLOPs of images of this grid of which so many patches are kept, 0 for one that exits."""

    def dense_flops(self, model: TimmModule, images: int, grid: Grid) -> int:
        """FLOPs of timm's own forward of so many images."""


@ieee_float32()
@sdpa_kernel(SDPBackend.MATH)
def find_mismatch(family: Family, model: TimmModule) -> str | None:
    """Which stage of a patched model is not timm's when everything is kept, or None: tried on noise.

    Catches what no list of supported parts can: a projection that is more than its weight, hooks that change what they
    see, norms and MLPs that mix tokens, a timm that works otherwise. The embedding is tried on one image; the blocks
    and the head on two sequences of a few tokens, which costs little more than reading the weights once, or on the
    tokens of one image where timm's blocks take no fewer. In float32 nothing is rounded to TF32 meanwhile, and nothing
    attends by torch's fused kernel, which adds up products of TF32: our kernels do neither.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(parameter.device, parameter.dtype)

    image = noise(1, model.in_chans, *model.patch_embed.img_size)
    grid = family.grid_size(model, image)
    patches = grid[0] * grid[1]
    indices, packed, parts = _everything(family, model, 1, patches, grid)
    embedded = family.dense_embed(model, image)
    tokens = family.embed(model, image, indices, parts[0].cu_seqlens, parts[0].total, grid)
    if not _agrees(tokens, embedded[0]):
        if not torch.isfinite(embedded).all():
            return "weights that are not finite: its patch embedding answers NaN or infinity to noise"
        return "a patch embedding that is not what its weights say"

    few = family.trial_patches(model, grid)
    if few < patches:
        _, packed, parts = _everything(family, model, 2, few, grid)
        embedded = embedded[:, : family.num_prefix_tokens(model) + few].expand(2, -1, -1)
    sequences = noise(*embedded.shape)
    encoded = family.dense_encode(model, sequences)
    tokens, read = family.encode(model, sequences.flatten(0, 1), packed, parts)
    rows = read.total // len(encoded)  # of each sequence, from its first on
    if not _agrees(tokens, encoded[:, :rows].flatten(0, 1)):
        if not torch.isfinite(encoded).all():
            return "weights that are not finite: its blocks answer NaN or infinity to noise"
        return "blocks that are not timm's, or that mix tokens elsewhere than in attention"
    sequences = noise(*encoded.shape)
    expected = family.dense_classify(model, sequences)
    if not _agrees(family.classify(model, sequences[:, :rows].flatten(0, 1), read), expected):
        if not torch.isfinite(expected).all():
            return "weights that are not finite: its head answers NaN or infinity to noise"
        return "a pool or head that is not timm's"
    return None


def _everything(
    family: Family, model: TimmModule, images: int, patches: int, grid: Grid
) -> tuple[Tensor, Packed, list[Part]]:
    """Indices and layout of images that all keep the first patches of the grid."""
    prefix = family.num_prefix_tokens(model)
    indices, packed, parts = pack_alike(images, patches, grid, prefix, next(model.parameters()).device)
    positions = ops.patch_positions(indices, packed.cu_seqlens, packed.total, prefix)
    return indices, packed._replace(positions=positions), parts


def _agrees(out: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of the dtype: in root mean square, and, where rounding averages out, in scale."""
    if out.shape != expected.shape:
        return False
    spread, gain = (1e-5, 1e-5) if out.dtype in (torch.float32, torch.float64) else (2e-2, 2e-3)
    out, expected = out.double().flatten(), expected.double().flatten()
    power = expected.dot(expected)
    off = out - expected
    return bool(off.dot(off) <= spread**2 * power) and bool(off.dot(expected).abs() <= gain * power)
