"""A replacement for CUDA graphs that runs without a GPU."""

import torch
from torch.utils import _pytree as pytree

from tinydrop_kernels.engine.cuda_graphs import Recording


class Again:
    """A replacement for ``cuda_graphs.Recorder`` on any device. A replay runs the stage again into the same outputs."""

    def __init__(self, device):
        pass

    def record(self, stage, inputs):
        outputs = stage(*inputs)

        def replay():
            for old, new in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(stage(*inputs)), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return Recording(inputs, outputs, replay)
