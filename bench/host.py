"""Host time of a call until its kernel launch, measured without a GPU. The launcher of Triton's kernels is a no-op.

    python bench/host.py [--calls 2000] [--json FILE]

All other code is that of a GPU run: the dispatcher, the checks, and the choice of an implementation and of a tile. It
includes Triton's work until it hands the arguments to the driver. Tensors are in CPU memory, and still take the path of
the kernels. Times are microseconds of process time on one thread. Each is the minimum of several rounds, because other
processes can only add time.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import timm
import torch
import triton
from static import AbsentGpu
from torch import Tensor
from triton.runtime import driver

import tinydrop_kernels as tdk
from tinydrop_kernels import ops
from tinydrop_kernels.engine import steps
from tinydrop_kernels.families import Family
from tinydrop_kernels.ops import registry

ROUNDS = 7
ROWS = 50  # packed rows of one image: 49 patches and the class token


class IdleGpu(AbsentGpu):
    """A GPU on which every launch ends at once. Only the values that the host reads back are written."""

    utils = SimpleNamespace(
        load_binary=lambda name, *others: (name, name, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        unload_module=lambda module: None,
    )

    def launcher_cls(self, src, metadata) -> Callable:
        is_pack = src.fn.__name__ == "pack_kernel"

        def launch(*arguments) -> None:
            if is_pack:
                order, _, read_back = arguments[11:14]  # after nine arguments of the launcher, counts and levels
                order.zero_()
                levels = len(read_back) // 2 - 1
                read_back.copy_(torch.tensor([ROWS, ROWS, 1, *[0] * (levels - 1), ROWS, *[0] * (levels - 1)]))

        return launch


@functools.cache
def kernels_first(operator: registry.Operator, *others) -> Sequence[registry.Implementation]:
    """Return the implementations that a GPU without the CUDA extension tries."""
    return [i for i in operator.implementations if i.name != "cuda"]


def host_us(call: Callable, calls: int) -> float:
    for _ in range(10):
        call()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.process_time() - start) / calls)
    return min(times)


def attention_calls() -> dict[str, Callable]:
    """Return the attention calls of one layer of a ViT-L whose images keep a quarter of their patches."""
    found = {}
    for batch in (1, 64):
        qkv = torch.zeros(50 * batch, 3, 16, 64, dtype=torch.bfloat16).unbind(1)
        cu_seqlens = torch.arange(0, 50 * batch + 1, 50, dtype=torch.int32)
        arguments = (*qkv, cu_seqlens, cu_seqlens, 50, 50, 0.125)
        found[f"varlen_attention, batch {batch}"] = lambda arguments=arguments: ops.varlen_attention(*arguments)
    return found


def front_end_calls() -> dict[str, Callable]:
    """Return the calls from the guidance model's output to packed tokens, at batch 1, where host time dominates."""
    dtype, grids = torch.bfloat16, [(14, 14), (12, 12), (11, 11), (9, 9), (7, 7)]
    logits, features = torch.zeros(1, 1000, dtype=dtype), torch.zeros(1, 49, 448, dtype=dtype)
    class_weight, images = torch.zeros(1000, 448, dtype=dtype), torch.zeros(1, 3, 224, 224, dtype=dtype)
    weight, bias = torch.zeros(1024, 3, 16, 16, dtype=dtype), torch.zeros(1024, dtype=dtype)
    prefix, pos_embed = torch.zeros(1, 1024, dtype=dtype), torch.zeros(196, 1024, dtype=dtype)
    law = ops.Law(0.8, 2.0, 0.25)
    indices = torch.full((1, 196), -1, dtype=torch.int32)
    counts, levels = torch.tensor([49], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 50], dtype=torch.int32)

    def select() -> ops.Selection:
        return ops.select_tokens(logits, features, class_weight, (7, 7), grids, law)

    def pack() -> tuple:
        return ops.pack(counts, levels, grids, 1)

    def embed() -> Tensor:
        return ops.embed_tokens(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, 50)

    def front_end() -> None:
        select()
        pack()
        embed()

    return {"select_tokens": select, "pack": pack, "embed_tokens": embed, "front end": front_end}


class IdleFamily:
    """A family whose blocks and head return precomputed tensors."""

    def __init__(self, family: Family, tokens: Tensor, logits: Tensor):
        self._family, self._tokens, self._logits = family, tokens, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def encode(self, *others: Any) -> tuple[Tensor, None]:
        return self._tokens, None

    def classify(self, *others: Any) -> Tensor:
        return self._logits


def whole_calls() -> dict[str, Callable]:
    """Return a patched model's call at batch 1 without the time of its two models, and the call's checks."""
    found: dict[str, Callable] = {}
    for name, architecture in (("ViT-B", "vit_base_patch16_224"), ("Swin-T", "swin_tiny_patch4_window7_224")):
        model, images = timm.create_model(architecture).eval(), torch.zeros(1, 3, 224, 224)
        guidance = timm.create_model("test_byobnet", num_classes=1000)
        tinydrop = tdk.patch(model, guidance, tdk.DropPolicy.fixed(0.25)).tinydrop
        guided = steps.guide(tinydrop, images)
        tinydrop.guidance.forward = lambda *others, guided=guided: guided
        tinydrop.family = IdleFamily(tinydrop.family, torch.zeros(ROWS, 768), torch.zeros(1, 1000))
        found[f"checks of a call, {name}"] = functools.partial(tinydrop.check, images)
        found[f"call beside its models, {name}"] = functools.partial(model, images)
    return found


@torch.inference_mode()
def measured(calls: int) -> dict[str, float]:
    """Return the microseconds of each call."""
    # All calls are set up before the idle GPU, because patching needs kernels that compute.
    timed = attention_calls() | front_end_calls() | whole_calls()
    driver.set_active(IdleGpu(90))
    torch.set_num_threads(1)
    with mock.patch.object(registry, "_preference", kernels_first):
        return {name: host_us(call, calls) for name, call in timed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args.calls)
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    for name, us in found.items():
        print(f"{name:32s}{us:6.1f} us")
    if args.json:
        args.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
