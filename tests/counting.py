"""Counters of device synchronisations and of FLOPs, and a comparison of the Triton kernels with the reference."""

import torch
from helpers import tiny_guidance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tinydrop_kernels as tdk
from tinydrop_kernels import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
READS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class SizesFromValues(TorchDispatchMode):
    """A dispatch mode that records operations for which the host would wait for a GPU.

    These are operations whose result's size depends on values, and tensors made from Python numbers. A CUDA graph
    cannot hold either of them.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indices = args[1] if name == "aten.index.Tensor" else ()
        if (
            "nonzero" in name
            or "masked_select" in name
            or "lift_fresh" in name
            or any(i is not None and i.dtype == torch.bool for i in indices)
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def assert_same_on_the_kernels(model, images):
    """Assert that both backends give the same logits and keep the same patches, with exits and several grids."""
    tdk.patch(model, tiny_guidance(), tdk.DropPolicy(tau=0.6, gamma=1.0, min_keep=0.1, coarsen=0.5, second_look=None))
    with torch.inference_mode():
        with ops.use_backend("reference"):
            wanted = model(images)
        kept = model.tinydrop.last.selection.indices
        with ops.use_backend("triton"):
            out = model(images)
        assert torch.equal(model.tinydrop.last.selection.indices, kept)
        torch.testing.assert_close(out, wanted, atol=1e-4, rtol=1e-4)


def counted(call, *args) -> int:
    """Return the FLOPs of a call. Attention runs unfused, because torch 2.11 does not count fused attention on CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()
