"""Benchmark of ``pack`` without its read-back, whose wait for the device is timed in test_front_end.py."""

import torch
import torch.nn.functional as F
from measure import DEVICE

from tinydrop_kernels.ops.types import LEVELS


def user(counts, levels):
    """Sort images by level, with exits last. Return the order, the packing, and counts of images and rows per level."""
    place = torch.where(counts > 0, levels, len(LEVELS))
    order = place.argsort(stable=True)
    lengths = torch.where(counts > 0, counts + 1, 0)
    cu_seqlens = F.pad(lengths[order].cumsum(0, dtype=torch.int32), (1, 0))
    is_at = place[:, None] == torch.arange(len(LEVELS), device=counts.device)
    images, rows = is_at.sum(0), (is_at * lengths[:, None]).sum(0)
    return order.int(), cu_seqlens, torch.cat((lengths.max()[None], cu_seqlens[-1:], images, rows)).int()


def agree(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert own.equal(other)


def test_pack(case, compare):
    def make_arguments():
        counts = torch.randint(case.num_patches + 1, (case.batch,), dtype=torch.int32, device=DEVICE)
        return counts, torch.randint(len(LEVELS), (case.batch,), dtype=torch.int32, device=DEVICE)

    def own(counts, levels):
        return torch.ops.tinydrop.pack.default(counts, levels, len(LEVELS), 1)

    moved_bytes = 4 * (4 * case.batch + 1 + 2 + 2 * len(LEVELS))
    compare("pack", own, user, make_arguments, moved_bytes, agree=agree)
