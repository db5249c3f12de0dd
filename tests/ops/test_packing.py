"""Tests of the layout of a ragged batch on every backend, against a loop over its images."""

from itertools import pairwise

import pytest
import torch

from tinydrop_kernels.ops import pack, patch_positions

from .cases import cu_seqlens_of

GRIDS = [(9, 9), (8, 8), (7, 7), (6, 6)]


def check_pack(counts, levels, num_levels, prefix, device):
    given = (torch.tensor(values, dtype=torch.int32, device=device) for values in (counts, levels))
    assert_packed(*pack(*given, GRIDS[:num_levels], prefix), counts, levels, num_levels, prefix)


def assert_packed(packed, parts, counts, levels, num_levels, prefix):
    lengths, expected_parts = [], []
    for level in range(num_levels):
        images = [b for b, own in enumerate(levels) if own == level and counts[b]]
        if images:
            expected_parts.append((level, images, [counts[b] + prefix for b in images]))
            lengths += expected_parts[-1][2]
    assert packed.cu_seqlens.dtype == torch.int32 and packed.positions is None
    assert packed.cu_seqlens.tolist() == cu_seqlens_of(lengths).tolist()
    assert (packed.max_seqlen, packed.total) == (max(lengths, default=0), sum(lengths))
    assert len(parts) == len(expected_parts)
    for part, (level, images, own_lengths) in zip(parts, expected_parts, strict=True):
        assert part.images.dtype == part.cu_seqlens.dtype == torch.int32
        assert (part.grid, part.images.tolist(), part.total) == (GRIDS[level], images, sum(own_lengths))
        assert [end - start for start, end in pairwise(part.cu_seqlens.tolist())] == own_lengths
        assert part.cu_seqlens[0] == 0


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("counts", "levels"),
    [
        ([3, 0, 16, 1], [0, 0, 0, 0]),
        ([3, 0, 16, 1, 7], [2, 1, 0, 2, 0]),  # a level that only an exited image has
        ([0, 0], [0, 2]),
        ([16], [1]),
        ([0, 5], [2, 2]),
        ([5, 0, 0], [1, 1, 0]),
        ([1, 1, 1, 1], [2, 1, 0, 1]),
    ],
    ids=str,
)
def test_pack(backend, counts, levels, prefix):
    check_pack(counts, levels, 3, prefix, backend.device)


# The kernel's tile holds 512 images. The batches are a full tile, one image more, and several tiles; some tiles lack a
# level.
@pytest.mark.parametrize("batch", [512, 513, 1300])
@pytest.mark.parametrize("exits", [0.0, 0.4, 1.0])
def test_several_tiles(backend, batch, exits):
    counts = torch.randint(1, 50, (batch,)) * (torch.rand(batch) >= exits)
    levels = torch.randint(0, 4, (batch,))
    levels[600:] = 3
    check_pack(counts.tolist(), levels.tolist(), 4, 5, backend.device)


def test_one_level(backend):
    check_pack([4, 0, 9], [0, 0, 0], 1, 1, backend.device)


def test_counts_and_levels_with_gaps(backend):
    counts = torch.tensor([3, 99, 0, 99, 5, 99], dtype=torch.int32, device=backend.device)[::2]
    levels = torch.tensor([1, 99, 0, 99, 0, 99], dtype=torch.int32, device=backend.device)[::2]
    assert_packed(*pack(counts, levels, GRIDS[:2], 1), [3, 0, 5], [1, 0, 0], 2, 1)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_positions(backend, prefix):
    indices = torch.tensor([[0, 3, 7, -1], [-1, -1, -1, -1], [2, -1, -1, -1]], dtype=torch.int32)
    rows = [*[-1] * prefix, 0, 3, 7, *[-1] * prefix, 2]
    starts = cu_seqlens_of([prefix + 3, 0, prefix + 1]).to(backend.device)
    positions = patch_positions(indices.to(backend.device), starts, len(rows), prefix)
    assert positions.dtype == torch.int32 and positions.tolist() == rows
