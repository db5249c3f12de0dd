"""Attention within segments, at ViT-B's heads. The operator has no kernel yet; on CUDA there is nothing to time."""

import pytest
import torch
import torch.nn.functional as F
from measure import CUDA, DEVICE, ops, randn, size_of

HEADS, HEAD_DIM = 12, 64


def user(query, key, value, index, mask):
    """Pad to the longest segment, mask the padding's keys, and pack again."""

    def padded(packed):
        rows = packed.new_zeros(mask.numel(), HEADS, HEAD_DIM).index_copy_(0, index, packed)
        return rows.view(*mask.shape, HEADS, HEAD_DIM).transpose(1, 2)

    out = F.scaled_dot_product_attention(padded(query), padded(key), padded(value), attn_mask=mask[:, None, None])
    return out.transpose(1, 2).flatten(0, 1)[index]


@pytest.mark.skipif(CUDA and not ops.KERNELS["varlen_attention"], reason="varlen_attention has no kernel yet")
def test_varlen_attention(case, compare):
    spread = torch.linspace(0.5, 1.5, case.batch) if case.batch > 1 else torch.ones(1)
    lengths = ((case.kept * spread).int() + 1).to(DEVICE)
    cu_seqlens = torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))
    longest, total = int(lengths.max()), int(cu_seqlens[-1])
    mask = torch.arange(longest, device=DEVICE) < lengths[:, None]
    index = mask.flatten().nonzero()[:, 0]

    def make_arguments():
        return tuple(randn(total, 3, HEADS, HEAD_DIM).unbind(1))

    def own(query, key, value):
        return ops.varlen_attention(query, key, value, cu_seqlens, cu_seqlens, longest, longest)

    def eager(query, key, value):
        return user(query, key, value, index, mask)

    query, _, _ = make_arguments()
    flops = 4 * int(lengths.long().square().sum()) * HEADS * HEAD_DIM
    compare("varlen_attention", own, eager, make_arguments, 4 * size_of(query) + size_of(cu_seqlens), flops)
