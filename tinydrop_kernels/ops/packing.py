"""The operator ``pack``: the layout of a ragged batch, and the batch's only read-back from the device."""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops.gather import gather_tokens
from tinydrop_kernels.ops.registry import define, kernels, reference, triton
from tinydrop_kernels.ops.types import Grid, Packed, Part
from tinydrop_kernels.torch_internals import eager


class Packing(NamedTuple):
    """A layout that is still on the device. The host learns it from :meth:`read`."""

    order: Tensor  # int32 (batch,): the images sorted by level, exited images last
    cu_seqlens: Tensor  # int32 (batch + 1,): first row of each image's segment, in that order, then the total
    sizes: Tensor  # int32 (2 * grids + 2,): longest segment, total, images of each grid, rows of each grid
    grids: list[Grid]

    @eager  # not compiled, because torch would treat the numbers read back as constants
    def read(self) -> tuple[Packed, list[Part]]:
        """Return the same as :func:`pack`. Waits for the device (on a GPU for the current stream)."""
        max_seqlen, total, *by_level = self.sizes.tolist()
        images, rows = by_level[: len(self.grids)], by_level[len(self.grids) :]
        starts = list(accumulate(images, initial=0))
        parts, first_row = [], 0
        for level, (start, end) in enumerate(pairwise(starts)):
            if end > start:
                own_starts = self.cu_seqlens[start : end + 1]
                own_starts = own_starts - first_row if first_row else own_starts
                parts.append(Part(self.grids[level], self.order[start:end], own_starts, rows[level]))
                first_row += rows[level]
        return Packed(self.cu_seqlens[: starts[-1] + 1], max_seqlen, total), parts


def lay_out(counts: Tensor, levels: Tensor, grids: list[Grid], num_prefix_tokens: int) -> Packing:
    """Lay out a batch like :func:`pack`, but without the read-back, so that the host does not wait for a GPU."""
    order, cu_seqlens, sizes = _op(counts, levels, len(grids), num_prefix_tokens)
    return Packing(order, cu_seqlens, sizes, grids)


def pack(counts: Tensor, levels: Tensor, grids: list[Grid], num_prefix_tokens: int) -> tuple[Packed, list[Part]]:
    """Compute where each image's kept tokens go in the packed batch. Images of one grid become neighbours.

    Images of the same grid keep their order. Images that exit get no segment. ``2 * len(grids) + 2`` numbers are read
    back from the device in one copy, which is the only synchronisation of a batch.

    Args:
        counts: int32 ``(batch,)``, ``batch >= 1``: kept patches, 0 for an image that exits.
        levels: int32 ``(batch,)``: position of each image's own grid in ``grids``.
        grids: rows and columns of each grid.
        num_prefix_tokens: rows in front of the patches of every image that does not exit.

    Returns:
        The layout, and its parts: one for each grid in use, in the order of their rows.

    Example:
        >>> counts, levels = torch.tensor([3, 0, 2]).int(), torch.tensor([1, 0, 0]).int()
        >>> packed, parts = ops.pack(counts, levels, [(4, 4), (2, 2)], num_prefix_tokens=1)
        >>> packed.cu_seqlens.tolist(), [part.images.tolist() for part in parts]  # image 1 exits
        ([0, 3, 7], [[2], [0]])
    """
    return lay_out(counts, levels, grids, num_prefix_tokens).read()


def pack_alike(
    images: int, patches: int, grid: Grid, num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Packed, list[Part]]:
    """Lay out images that all keep the first ``patches`` patches of one grid. This needs no read-back.

    Returns:
        The indices of those patches, int32 ``(images, patches)``, the layout, and its one part.
    """
    length = num_prefix_tokens + patches
    places = torch.arange(max(patches, images + 1), dtype=torch.int32, device=device)
    cu_seqlens = places[: images + 1] * length
    packed = Packed(cu_seqlens, length, images * length)
    return places[:patches].expand(images, -1), packed, [Part(grid, places[:images], cu_seqlens, packed.total)]


def patch_positions(indices: Tensor, cu_seqlens: Tensor, total: int, num_prefix_tokens: int) -> Tensor:
    """Return the patch of each packed row.

    Args:
        indices, cu_seqlens, total: as in :func:`ops.embed_tokens`.
        num_prefix_tokens: rows in front of each segment's patches.

    Returns:
        int32 ``(total,)``: the number of the patch on its image's grid, -1 for a prefix token.

    Example:
        >>> indices, cu_seqlens = torch.tensor([[0, 3], [2, -1]]).int(), torch.tensor([0, 3, 5]).int()
        >>> ops.patch_positions(indices, cu_seqlens, total=5, num_prefix_tokens=1).tolist()
        [-1, 0, 3, -1, 2]
    """
    segments, places = indices.shape
    place = torch.arange(places, dtype=torch.int32, device=indices.device)
    prefix = torch.full((1, 1, 1), -1, dtype=torch.int32, device=indices.device)
    prefix = prefix.expand(segments, num_prefix_tokens, -1)
    return gather_tokens(indices[..., None], prefix, place.where(indices >= 0, -1), cu_seqlens, total)[:, 0]


def _reference(counts: Tensor, levels: Tensor, num_levels: int, num_prefix_tokens: int) -> tuple[Tensor, ...]:
    """Compute the layout in plain Python, which for a batch of numbers is faster than a dozen PyTorch calls."""
    seqlens = [count + num_prefix_tokens if count else 0 for count in counts.tolist()]
    place = [own if seqlen else num_levels for own, seqlen in zip(levels.tolist(), seqlens, strict=True)]
    order = sorted(range(len(place)), key=place.__getitem__)
    cu_seqlens = list(accumulate((seqlens[image] for image in order), initial=0))
    images, rows = [0] * (num_levels + 1), [0] * (num_levels + 1)  # the last entry counts exited images
    for own, seqlen in zip(place, seqlens, strict=True):
        images[own] += 1
        rows[own] += seqlen
    sizes = [max(seqlens), cu_seqlens[-1], *images[:-1], *rows[:-1]]
    return tuple(
        torch.tensor(numbers, dtype=torch.int32, device=counts.device) for numbers in (order, cu_seqlens, sizes)
    )


def _triton(*arguments: Any) -> tuple[Tensor, ...]:
    return kernels("packing").launch(*arguments)  # type: ignore[no-any-return]


def _fake(counts: Tensor, levels: Tensor, num_levels: int, num_prefix_tokens: int) -> tuple[Tensor, ...]:
    batch = counts.shape[0]
    return tuple(counts.new_empty(size) for size in (batch, batch + 1, 2 * num_levels + 2))


_op = define(
    "pack(Tensor counts, Tensor levels, int num_levels, int num_prefix_tokens) -> (Tensor, Tensor, Tensor)",
    _fake,
    [triton(_triton), reference(_reference)],
)
