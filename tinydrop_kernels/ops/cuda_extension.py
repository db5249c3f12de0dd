"""The optional, experimental CUDA C++ extension, ``tinydrop_kernels._C`` (built by setup.py from ``csrc/``)."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

MAX_HEAD_DIM = 128
MAX_GRID = 32  # rows and columns of a bias's grid; at 32 x 32 the table takes 40 KB of shared memory
MAX_ROW_STRIDE = 2**30 - 1
SCALES = 2.0**-126, 2.0**126  # a normal float32, even after multiplication by log2(e)


def _load() -> tuple[tuple[str, ...], str]:
    """Return the GPU architectures that the extension was compiled for, and why it is missing ("" if it is loaded)."""
    try:
        extension = importlib.import_module("tinydrop_kernels._C")
    except ModuleNotFoundError:
        return (), "it is not built"
    except Exception as error:
        return (), f"it does not load: {error}"
    return tuple(extension.ARCHITECTURES.split(";")), ""


ARCHITECTURES, WHY_NOT = _load()


def available() -> bool:
    """Return whether the extension is loaded. If not, :data:`WHY_NOT` holds the reason."""
    return not WHY_NOT


def compiled_for(major: int, minor: int) -> bool:
    """Return whether a GPU of this compute capability runs the extension.

    Code for ``80`` runs on 8.0 and every later 8.x, ``80+PTX`` also on all later GPUs, and ``90a`` on 9.0 only.
    """

    def runs(name: str) -> bool:
        code, ptx, _ = name.partition("+")
        if code[-1] in "af":
            return code[:-1] == f"{major}{minor}"
        return int(code) <= 10 * major + minor and (bool(ptx) or int(code) // 10 == major)

    return any(runs(name) for name in ARCHITECTURES)


@functools.cache
def _gpu(index: int) -> tuple[bool, bool]:
    """Return whether a GPU runs the extension, and whether a block has enough shared memory for a bias of any head_dim.

    GPUs that are not made for data centers have 99 KB a block, in which a bias fits only up to a head_dim of 64.
    """
    gpu: Any = torch.cuda.get_device_properties(index)
    return compiled_for(gpu.major, gpu.minor), gpu.shared_memory_per_block_optin >= 160 * 1024


def is_aligned(tensor: Tensor) -> bool:
    """Return whether every row of head_dim elements is contiguous and begins at a multiple of 16 bytes."""
    (rows, heads, _), (row_stride, head_stride, stride) = tensor.shape, tensor.stride()
    are_aligned = (row_stride % 8 == 0 or rows == 1) and (head_stride % 8 == 0 or heads == 1)
    return are_aligned and stride == 1 and tensor.data_ptr() % 16 == 0


def missing_on(device_type: str) -> str | None:
    """Return why the extension cannot run on this type of device; None if it can."""
    if device_type != "cuda":
        return f"the CUDA extension does not run on {device_type}"
    return None if available() else f"the CUDA extension is not available: {WHY_NOT}"


def takes(call: Any) -> bool:
    """Return whether the extension takes these arguments of ``varlen_attention``, named as in its schema."""
    query, table = call.query, call.bias_table
    if not query.is_cuda or call.skip_keys:
        return False
    runs, has_room = _gpu(query.device.index)
    return (
        runs
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] % 8 == 0
        and 8 <= query.shape[2] <= MAX_HEAD_DIM
        and (call.scale is None or SCALES[0] <= call.scale <= SCALES[1])
        and (
            table is None
            or (table.dtype == query.dtype and max(call.grid_size) <= MAX_GRID and (query.shape[2] <= 64 or has_room))
        )
        and all(is_aligned(t) and t.stride(0) <= MAX_ROW_STRIDE for t in (query, call.key, call.value))
    )


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    bias_table: Tensor | None,
    positions: Tensor | None,
    grid_size: tuple[int, int],
    skip_keys: int,
) -> Tensor:
    """Run :func:`ops.varlen_attention` on arguments that the extension :func:`takes`."""
    out: Tensor = torch.ops.tinydrop_cuda.varlen_attention(
        query,
        key,
        value,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        query.shape[2] ** -0.5 if scale is None else scale,
        bias_table,
        None if positions is None else positions.contiguous(),
        *grid_size,
    )
    return out
