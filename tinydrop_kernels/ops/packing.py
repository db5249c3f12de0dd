"""The layout of a ragged batch, and the one read back from the device."""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops.gather import gather_tokens
from tinydrop_kernels.ops.registry import define, kernels, reference, triton
from tinydrop_kernels.ops.types import Grid, Packed, Part
from tinydrop_kernels.torch_internals import eager


class Packing(NamedTuple):
    """A batch laid out on its device, of which the host knows nothing before :meth:`read`."""

    order: Tensor  # int32 (batch,): the images by level, those that exited last
    cu_seqlens: Tensor  # int32 (batch + 1,): where the segment of each begins, in that order, and the total
    sizes: Tensor  # int32 (2 * grids + 2,): longest segment, total, images of each grid, rows of each
    grids: list[Grid]

    @eager  # it ends a graph anyway, and what is read back would be taken for constants
    def read(self) -> tuple[Packed, list[Part]]:
        """What :func:`pack` returns. Waits for the device, or for the current stream of a GPU."""
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
    """:func:`pack` without the read-back: on a GPU the host does not wait."""
    order, cu_seqlens, sizes = _op(counts, levels, len(grids), num_prefix_tokens)
    return Packing(order, cu_seqlens, sizes, grids)


def pack(counts: Tensor, levels: Tensor, grids: list[Grid], num_prefix_tokens: int) -> tuple[Packed, list[Part]]:
    """Lay the kept tokens of a batch behind one another, images of one grid beside one another.

    Within a level the images keep their order. Those that exited have no segment. Reads ``2 * len(grids) + 2`` numbers
    back from the device, in one copy: the only synchronisation of a batch.

    Args:
        counts: int32 ``(batch,)``, ``batch >= 1``: kept patches, 0 for an image that exits.
        levels: int32 ``(batch,)``, which grid is an image's own.
        grids: rows and columns of each.
        num_prefix_tokens: rows that every image that does not exit brings in front of its patches.

    Returns:
        The layout, and its parts, one for each grid in use, in the order in which their rows are packed.
    """
    return lay_out(counts, levels, grids, num_prefix_tokens).read()


def pack_alike(
    images: int, patches: int, grid: Grid, num_prefix_tokens: int, device: torch.device
) -> tuple[Tensor, Packed, list[Part]]:
    """:func:`pack` of images that all keep the first patches of one grid, which needs no read-back.

    Returns:
        The indices of those patches, int32 ``(images, patches)``, the layout, and its one part.
    """
    length = num_prefix_tokens + patches
    places = torch.arange(max(patches, images + 1), dtype=torch.int32, device=device)
    cu_seqlens = places[: images + 1] * length
    packed = Packed(cu_seqlens, length, images * length)
    return places[:patches].expand(images, -1), packed, [Part(grid, places[:images], cu_seqlens, packed.total)]


def patch_positions(indices: Tensor, cu_seqlens: Tensor, total: int, num_prefix_tokens: int) -> Tensor:
    """Where each packed row's patch is on its image's grid: int32 ``(total,)``, -1 for a prefix token.

    Args:
        indices, cu_seqlens, total: as in :func:`ops.embed_tokens`.
        num_prefix_tokens: rows in front of each segment's patches.
    """
    segments, places = indices.shape
    place = torch.arange(places, dtype=torch.int32, device=indices.device)
    prefix = torch.full((1, 1, 1), -1, dtype=torch.int32, device=indices.device)
    prefix = prefix.expand(segments, num_prefix_tokens, -1)
    return gather_tokens(indices[..., None], prefix, place.where(indices >= 0, -1), cu_seqlens, total)[:, 0]


def _reference(counts: Tensor, levels: Tensor, num_levels: int, num_prefix_tokens: int) -> tuple[Tensor, ...]:
    """In plain Python, which for the few numbers of a batch takes less than calling PyTorch a dozen times."""
    seqlens = [count + num_prefix_tokens if count else 0 for count in counts.tolist()]
    place = [own if seqlen else num_levels for own, seqlen in zip(levels.tolist(), seqlens, strict=True)]
    order = sorted(range(len(place)), key=place.__getitem__)
    cu_seqlens = list(accumulate((seqlens[image] for image in order), initial=0))
    images, rows = [0] * (num_levels + 1), [0] * (num_levels + 1)  # the last of images that exited
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
