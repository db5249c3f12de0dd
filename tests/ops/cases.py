"""What the tests of several operators are made of."""

import math
import os
from itertools import accumulate
from typing import NamedTuple

import torch

GPU = torch.cuda.is_available()
# compute-sanitizer sees where a tensor ends only if the allocator keeps no memory, and then it serves no CUDA graph.
SANITIZED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps  # sums are float32 whatever they are of


class Backend(NamedTuple):
    """A backend to force, and where the tensors lie."""

    name: str
    device: str

    def __str__(self):
        return self.name if self.device == "cpu" else f"{self.name} on {self.device}"


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Bound the error of a sum of so many products, relative to the size of its partial sums.

    Each partial sum is rounded by half a unit in the last place at most, at random: four standard deviations of all of
    them, in whatever order an instruction set takes them. The result is rounded once more, to its dtype.
    """
    return 2 * terms**0.5 * EPS + torch.finfo(dtype).eps


def logits_of(confidences: list[float], classes: int = 5, device: str = "cpu") -> torch.Tensor:
    """Logits whose max softmax is as asked for, each image's at another class."""
    rows = [[math.log((1 - c) / (classes - 1))] * classes for c in confidences]
    for b, (row, confidence) in enumerate(zip(rows, confidences, strict=True)):
        row[b % classes] = math.log(confidence)
    return torch.tensor(rows, device=device)


def integers(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Small enough for their products to be exact in float16 and bfloat16 inputs and float32 sums."""
    return torch.randint(-3, 4, shape, device=device).float()


def cu_seqlens_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


def ragged(counts: list[int], patches: int, prefix: int, device: str = "cpu", width: int | None = None, gap: int = 0):
    """Random kept patches, in ``width`` columns with ``gap`` others behind; their layout and total."""
    width = patches if width is None else width
    rows = torch.full((len(counts), width + gap), 2**30, dtype=torch.int32)
    rows[:, :width] = -1
    for row, count in zip(rows, counts, strict=True):
        row[:count] = torch.randperm(patches)[:count].sort().values
    lengths = [count and count + prefix for count in counts]
    return rows.to(device)[:, :width], cu_seqlens_of(lengths, device), sum(lengths)


def packed_by_hand(embedded: torch.Tensor, prefix: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Packed tokens from embedded patches ``(segments, patches, dim)`` and prefix rows, image by image, on the CPU."""
    rows = [embedded.new_empty(0, embedded.shape[2])]
    for image, own_prefix, row in zip(embedded, prefix.expand(len(embedded), -1, -1), indices.tolist(), strict=True):
        kept = [patch for patch in row if patch >= 0]
        if kept:
            rows += [own_prefix, image[kept]]
    return torch.cat(rows)
