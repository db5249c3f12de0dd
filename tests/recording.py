"""A replacement for CUDA graphs that runs without a GPU, and reads weights where they were recorded."""

import threading
from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree

from tinydrop_kernels.engine import cuda_graphs
from tinydrop_kernels.engine.cuda_graphs import Recording, StageGraphs

_of_thread = threading.local()


class Again:
    """A replacement for ``cuda_graphs.Recorder`` on any device.

    A replay runs the stage again, on aliases of the weights that the model had when it was recorded. So a replay after
    a weight was exchanged reads the old one, as a graph reads an old address.
    """

    def __init__(self, device):
        pass

    def record(self, stage, inputs):
        outputs = stage(*inputs)
        held = [
            (named, name, tensor.detach())
            for module in _of_thread.model.modules()
            for named in (module._parameters, module._buffers)
            for name, tensor in named.items()
            if tensor is not None
        ]

        def replay():
            with _as_recorded(held):
                again = stage(*inputs)
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return Recording(inputs, outputs, replay)


@contextmanager
def _as_recorded(held):
    now = [(named, name, named[name]) for named, name, _ in held if name in named]
    try:
        for named, name, tensor in held:
            named[name] = tensor
        yield
    finally:
        for named, name, tensor in now:
            named[name] = tensor


def replay_on_cpu(monkeypatch, recorder=Again):
    """Let patched models on a CPU record and replay."""
    check = StageGraphs.check

    def noting(self, watch):
        _of_thread.model = watch.model
        check(self, watch)

    monkeypatch.setattr(StageGraphs, "check", noting)
    monkeypatch.setattr(cuda_graphs, "Recorder", recorder)
    monkeypatch.setattr(cuda_graphs, "DEVICES", ("cpu", "cuda"))
