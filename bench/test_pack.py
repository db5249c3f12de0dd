"""The layout of a ragged batch. Without the read-back, which is the host's waiting for the device; see front_end."""

import torch
import torch.nn.functional as F
from measure import DEVICE


def user(counts):
    lengths = torch.where(counts > 0, counts + 1, 0)
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, torch.stack((lengths.max(), cu_seqlens[-1]))


def agree(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        assert own.equal(other)


def test_pack(case, compare):
    def make_arguments():
        return (torch.randint(case.num_patches + 1, (case.batch,), dtype=torch.int32, device=DEVICE),)

    def own(counts):
        return torch.ops.tinydrop.pack.default(counts, case.num_patches, 1, False)

    moved_bytes = 4 * (case.batch + case.batch + 1 + 2)
    compare("pack", own, user, make_arguments, moved_bytes, agree=agree)
