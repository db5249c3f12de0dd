"""The optional CUDA C++ extension, ``tinydrop_kernels._C`` (built by setup.py from ``csrc/``)."""

import functools
import importlib

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
MAX_GRID = 32  # rows and columns of a bias's grid: its table takes 40 KB of shared memory there


def _load() -> tuple[tuple[str, ...], str]:
    """The GPU architectures that the extension was compiled for, or none and why."""
    try:
        extension = importlib.import_module("tinydrop_kernels._C")
    except ModuleNotFoundError:
        return (), "it is not built"
    except Exception as error:
        return (), f"it does not load: {error}"
    return tuple(extension.ARCHITECTURES.split(";")), ""


ARCHITECTURES, WHY_NOT = _load()


def available() -> bool:
    """Whether the extension is loaded; :data:`WHY_NOT` says why not."""
    return not WHY_NOT


@functools.cache
def compiled_for(major: int, minor: int) -> bool:
    """Whether a GPU of this compute capability runs the extension.

    Code for ``sm_80`` runs on 8.0 and every later 8.x; code for ``sm_90a`` on 9.0 alone.
    """
    exact = {f"{major}{minor}a", f"{major}{minor}f"}
    return any(name in exact or name in {f"{major}{older}" for older in range(minor + 1)} for name in ARCHITECTURES)


def _aligned(tensor: Tensor) -> bool:
    """Whether every row of head_dim elements is contiguous and begins at a multiple of 16 bytes."""
    rows = all(size == 1 or stride % 8 == 0 for size, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True))
    return rows and tensor.stride(2) == 1 and tensor.data_ptr() % 16 == 0


def fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    bias_table: Tensor | None = None,
    positions: Tensor | None = None,
    grid_size: tuple[int, int] = (1, 1),
) -> bool:
    """Whether the extension is there and takes these arguments of :func:`ops.varlen_attention`."""
    return (
        available()
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] % 8 == 0
        and 8 <= query.shape[2] <= MAX_HEAD_DIM
        and (scale is None or scale > 0)
        and (bias_table is None or (bias_table.dtype == query.dtype and max(grid_size) <= MAX_GRID))
        and all(_aligned(tensor) for tensor in (query, key, value))
        and compiled_for(*torch.cuda.get_device_capability(query.device))
    )


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    bias_table: Tensor | None = None,
    positions: Tensor | None = None,
    grid_size: tuple[int, int] = (1, 1),
) -> Tensor:
    """See :func:`ops.varlen_attention`."""
    scale = query.shape[2] ** -0.5 if scale is None else scale
    return torch.ops.tinydrop_cuda.varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        scale,
        bias_table,
        positions,
        *grid_size,
    )
