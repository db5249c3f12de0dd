"""Inputs, tolerances and helpers that the tests of several operators share."""

import math
import os
from itertools import accumulate
from typing import NamedTuple

import torch

GPU = torch.cuda.is_available()
# compute-sanitizer sees the end of a tensor only if torch's allocator caches no memory. Then there are no CUDA graphs.
SANITIZED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps  # sums are float32 for all of these dtypes


class Backend(NamedTuple):
    """A backend to force, and the device of the tensors."""

    name: str
    device: str

    def __str__(self):
        return self.name if self.device == "cpu" else f"{self.name} on {self.device}"


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Return a bound on the error of a sum of ``terms`` products, relative to the size of its partial sums.

    Each partial sum has a random rounding error of at most half a unit in the last place. The bound allows four
    standard deviations of their total, in any order of summation, and one more rounding of the result to its dtype.
    """
    return 2 * terms**0.5 * EPS + torch.finfo(dtype).eps


def logits_of(confidences: list[float], classes: int = 5, device: str = "cpu") -> torch.Tensor:
    """Return logits whose max softmax is the given confidence, with each image's maximum at a different class."""
    rows = [[math.log((1 - c) / (classes - 1))] * classes for c in confidences]
    for b, (row, confidence) in enumerate(zip(rows, confidences, strict=True)):
        row[b % classes] = math.log(confidence)
    return torch.tensor(rows, device=device)


def integers(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Return random integers that are exact in float16 and bfloat16, and whose products sum exactly in float32."""
    return torch.randint(-3, 4, shape, device=device).float()


def cu_seqlens_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def ragged(counts: list[int], patches: int, prefix: int, device: str = "cpu", width: int | None = None, gap: int = 0):
    """Return indices of random kept patches, their cu_seqlens and their total.

    The indices are a view of ``width`` columns, with ``gap`` columns behind them that must not be read.
    """
    width = patches if width is None else width
    rows = torch.full((len(counts), width + gap), 2**30, dtype=torch.int32)
    rows[:, :width] = -1
    for row, count in zip(rows, counts, strict=True):
        row[:count] = torch.randperm(patches)[:count].sort().values
    lengths = [count and count + prefix for count in counts]
    return rows.to(device)[:, :width], cu_seqlens_of(lengths, device), sum(lengths)


def packed_by_hand(embedded: torch.Tensor, prefix: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Pack embedded patches ``(segments, patches, dim)`` and prefix rows in a loop over images, on the CPU."""
    rows = [embedded.new_empty(0, embedded.shape[2])]
    for image, own_prefix, row in zip(embedded, prefix.expand(len(embedded), -1, -1), indices.tolist(), strict=True):
        kept = [patch for patch in row if patch >= 0]
        if kept:
            rows += [own_prefix, image[kept]]
    return torch.cat(rows)
