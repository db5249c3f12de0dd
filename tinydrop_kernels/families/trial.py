"""The trial on random input. It runs when a model is patched, and again when a module of it was replaced."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinydrop_kernels import ops
from tinydrop_kernels.families.base import Family
from tinydrop_kernels.ops.packing import pack_alike
from tinydrop_kernels.ops.types import Grid, Packed, Part, TimmModule
from tinydrop_kernels.torch_internals import ieee_float32


@ieee_float32()
@sdpa_kernel(SDPBackend.MATH)
def find_mismatch(family: Family, model: TimmModule) -> str | None:
    """Return a description of the first stage of a patched model that differs from timm's, or None if none differs.

    All patches are kept, so both must agree. The trial finds what no list of supported parts can: a projection that
    does more than apply its weight, hooks that change values, norms and MLPs that mix tokens, or a changed timm.

    The embedding is tried on one image. The blocks and the head are tried on two sequences of a few tokens, or on the
    tokens of one image if timm's blocks take no fewer. This costs little more than reading the weights once.

    TF32 and torch's fused attention are disabled meanwhile, because their rounding could look like a mismatch.

    Args:
        family: the family of the model.
        model: a patched model in eval mode.

    Example:
        >>> from tinydrop_kernels.families import family_of, find_mismatch
        >>> patched = tdk.patch(model, guidance)
        >>> print(find_mismatch(family_of(patched), patched))
        None
        >>> _ = tdk.unpatch(patched)
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
            return "weights that are not finite: its patch embedding returns NaN or infinity for random input"
        return "a patch embedding that does more than project patches with its weights"

    few = family.trial_patches(model, grid)
    if few < patches:
        _, packed, parts = _everything(family, model, 2, few, grid)
        embedded = embedded[:, : family.num_prefix_tokens(model) + few].expand(2, -1, -1)
    sequences = noise(*embedded.shape)
    encoded = family.dense_encode(model, sequences)
    tokens, read = family.encode(model, sequences.flatten(0, 1), packed, parts)
    rows = read.total // len(encoded)  # number of tokens that the head reads per sequence, from the first on
    if not _agrees(tokens, encoded[:, :rows].flatten(0, 1)):
        if not torch.isfinite(encoded).all():
            return "weights that are not finite: its blocks return NaN or infinity for random input"
        return "blocks that are not timm's, or that mix tokens outside of attention"
    sequences = noise(*encoded.shape)
    expected = family.dense_classify(model, sequences)
    if not _agrees(family.classify(model, sequences[:, :rows].flatten(0, 1), read), expected):
        if not torch.isfinite(expected).all():
            return "weights that are not finite: its head returns NaN or infinity for random input"
        return "a pool or head that is not timm's"
    return None


def _everything(
    family: Family, model: TimmModule, images: int, patches: int, grid: Grid
) -> tuple[Tensor, Packed, list[Part]]:
    """Return the indices and layout of images that all keep the first ``patches`` patches of the grid."""
    prefix = family.num_prefix_tokens(model)
    indices, packed, parts = pack_alike(images, patches, grid, prefix, next(model.parameters()).device)
    positions = ops.patch_positions(indices, packed.cu_seqlens, packed.total, prefix)
    return indices, packed._replace(positions=positions), parts


def _agrees(out: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their dtype.

    Both the root mean square of the difference and the difference in scale are bounded. Rounding errors average out in
    the scale, so its bound is tighter in half precision.
    """
    if out.shape != expected.shape:
        return False
    spread, gain = (1e-5, 1e-5) if out.dtype in (torch.float32, torch.float64) else (2e-2, 2e-3)
    out, expected = out.double().flatten(), expected.double().flatten()
    power = expected.dot(expected)
    off = out - expected
    return bool(off.dot(off) <= spread**2 * power) and bool(off.dot(expected).abs() <= gain * power)
