"""Sizes that packed batches are padded to, so that one CUDA graph serves many of them.

Rows of zeros follow the tokens of a batch. Some of these rows form the shortest possible segments, which fill up the
number of segments. The remaining rows belong to no segment, so attention and pools ignore them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinydrop_kernels.ops.types import Packed

LEAST_ROWS = 16


class Bucket(NamedTuple):
    """A padded size: at most an eighth more rows than needed (15 more if few), and a power of two of segments."""

    rows: int
    segments: int
    max_seqlen: int
    filling: int  # rows of each segment that pads the number of segments: the prefix tokens, at least one

    @classmethod
    def of(cls, packed: Packed, num_prefix_tokens: int, longest: int) -> "Bucket":
        """Return the bucket of a batch.

        Args:
            packed: the layout of the batch, with at least one segment.
            num_prefix_tokens: prefix tokens of each segment.
            longest: upper bound of the length of any segment.
        """
        own, filling = len(packed.cu_seqlens) - 1, max(1, num_prefix_tokens)
        segments = _power_of_two(own)
        needed = packed.total + (segments - own) * filling
        step = max(LEAST_ROWS, _power_of_two(needed) // 16)
        rows = -(-needed // step) * step
        return cls(rows, segments, rows if segments == 1 else min(rows, longest), filling)

    def make(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors that :meth:`fill` writes to.

        Returns:
            Tokens ``(rows, dim)`` and cu_seqlens ``(segments + 1,)``. Also the constant ``(segments,)`` that holds the
            number of rows of 1, 2, ... padding segments.
        """
        starts = torch.arange(self.segments + 1, dtype=torch.int32, device=tokens.device) * self.filling
        return tokens.new_zeros(self.rows, tokens.shape[1]), starts.clone(), starts[1:]

    def fill(self, to: tuple[Tensor, Tensor, Tensor], tokens: Tensor, cu_seqlens: Tensor) -> None:
        """Overwrite the tensors from :meth:`make` with a batch of this bucket."""
        to_tokens, to_starts, fillings = to
        total, own = len(tokens), len(cu_seqlens) - 1
        to_tokens[:total].copy_(tokens)
        to_tokens[total:].zero_()
        to_starts[: own + 1].copy_(cu_seqlens)
        if own < self.segments:
            torch.add(fillings[: self.segments - own], total, out=to_starts[own + 1 :])


def _power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
