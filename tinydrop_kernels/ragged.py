"""The layout of a ragged batch, handed as an argument to whatever must tell the images apart."""

from typing import NamedTuple

from torch import Tensor


class RaggedLayout(NamedTuple):
    """Where each image's tokens lie among the packed ones; FlashAttention's conventions.

    It travels through timm's blocks in the place of ``attn_mask``, as ``torch.nn.attention.bias`` does, so that
    everything that works token by token stays timm's own code.
    """

    cu_seqlens: Tensor  # int32 (batch + 1,): where each segment begins, and the total
    max_seqlen: int  # longest segment
    total: int  # rows of the packed tokens
