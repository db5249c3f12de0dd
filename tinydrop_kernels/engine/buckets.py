"""Sizes that packed batches are padded to, so that one CUDA graph serves many of them.

Behind the tokens of a batch lie rows of zeros: some are segments of their own, as short as a segment can be, which make
up the number of segments; what is left belongs to none, and attention and pools do not look at it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import Packed

LEAST_ROWS = 16


class Bucket(NamedTuple):
    """What batches are padded to: at most an eighth more rows, and the next power of two of segments."""

    rows: int
    segments: int
    max_seqlen: int
    filling: int  # rows of a segment that is there to make up the number: its prefix tokens, or one

    @classmethod
    def of(cls, packed: Packed, num_prefix_tokens: int, longest: int) -> "Bucket":
        """The bucket of a batch of at least one segment, where no segment is longer than ``longest``."""
        own, filling = len(packed.cu_seqlens) - 1, max(1, num_prefix_tokens)
        segments = _power_of_two(own)
        needed = packed.total + (segments - own) * filling
        step = max(LEAST_ROWS, _power_of_two(needed) // 16)
        rows = -(-needed // step) * step
        return cls(rows, segments, rows if segments == 1 else min(rows, longest), filling)

    def make(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`fill` writes to: tokens, cu_seqlens, and the rows of 1, 2, ... fillings, which stay."""
        starts = torch.arange(self.segments + 1, dtype=torch.int32, device=tokens.device) * self.filling
        return tokens.new_zeros(self.rows, tokens.shape[1]), starts.clone(), starts[1:]

    def fill(self, to: tuple[Tensor, Tensor, Tensor], tokens: Tensor, cu_seqlens: Tensor) -> None:
        """Write a batch of this bucket over another."""
        to_tokens, to_starts, fillings = to
        total, own = len(tokens), len(cu_seqlens) - 1
        to_tokens[:total].copy_(tokens)
        to_tokens[total:].zero_()
        to_starts[: own + 1].copy_(cu_seqlens)
        if own < self.segments:
            torch.add(fillings[: self.segments - own], total, out=to_starts[own + 1 :])


def _power_of_two(number: int) -> int:
    """The least that is not less."""
    return 1 << (number - 1).bit_length()
