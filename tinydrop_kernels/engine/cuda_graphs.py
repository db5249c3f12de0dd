"""CUDA graphs: what a patched model does on the device, recorded once for each kind of call, then replayed.

At small batches the host takes longer to launch a ViT's kernels than a GPU to run them. A graph launches all of them at
once, but at fixed addresses, in fixed sizes and without a read-back. So there are two stages, on either side of the one
read-back of a batch: guidance, selection and packing, recorded by the shape of the images; and blocks and head, by a
bucket of rows (:mod:`tinydrop_kernels.engine.buckets`).

Experimental: tests play recordings on a CPU, and no GPU has recorded one yet.

A kind of call that is met for the first time runs without a graph, the second time it is recorded, which takes as long
as a few calls. Of each stage so many graphs are kept, the least recently used goes first; the graphs of a stage share
their memory, so that they take little more than the largest of them.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tinydrop_kernels.engine.watch import Watch
from tinydrop_kernels.ops.registry import forced_backend
from tinydrop_kernels.torch_internals import eager

DEVICES = ("cuda",)
MOST_GRAPHS = 16  # of a stage
MOST_IMAGES = 64  # beyond these sizes launching takes the host less time than the work takes the device: reckoned from
MOST_ROWS = 8192  # launches and FLOPs, not measured

Stage = Callable[..., Any]  # from the tensors it works on to tensors, in tuples as it likes
_one_at_a_time = threading.Lock()  # in a process one graph can be recorded at once


class Recording(NamedTuple):
    """A stage that is ready to be replayed on whatever lies in its inputs; ``outputs`` are overwritten each time."""

    inputs: tuple[Tensor, ...]
    outputs: Any
    replay: Callable[[], None]


class Graphs:
    """The graphs of a patched model, as ``model.tinydrop.graphs``. A copy of it, and what is pickled, is empty."""

    def __init__(self) -> None:
        self.front = StageGraphs()
        self.blocks = StageGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def __str__(self) -> str:
        return f"guidance, selection and packing: {self.front}; blocks and head: {self.blocks}"

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self.front.clear()
        self.blocks.clear()


class StageGraphs:
    """The graphs of one stage. Many threads may call it, on streams of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._watch: Watch | None = None
        self._pointers: list[int] = []
        self._recorder: Any = None
        self._stream: Any = None  # of the last replay
        self.recorded = self.replayed = self.not_replayed = 0

    def __str__(self) -> str:
        return f"{self.recorded} recorded, {self.replayed} calls replayed, {self.not_replayed} not"

    def clear(self) -> None:
        """Forget them."""
        with self._lock:
            self._found.clear()
            self._recorder = None

    def check(self, watch: Watch) -> None:
        """Discard all recordings if a module, weight or mode of the model was exchanged after they were made.

        A graph reads weights where they were, and runs nothing in Python. Values that were changed in place are where
        they were.

        Args:
            watch: of the model that the stage runs; another one means that the model has changed.
        """
        pointers = watch.pointers()
        if watch is not self._watch or pointers != self._pointers:
            if self._watch is not None:
                self.clear()
            self._watch, self._pointers = watch, pointers

    @eager
    def answer(
        self, kind: Hashable, stage: Stage, make: Callable[[], tuple[Tensor, ...]], fill: Callable[..., None]
    ) -> Any:
        """What ``stage(*inputs)`` answers, in new tensors; None where it is for the caller to run it.

        Behind :meth:`check`.

        Args:
            kind: of calls of which one graph serves all.
            stage: must work on its inputs alone, and always alike.
            make: makes its inputs, of values that it can work on.
            fill: writes this call's inputs over those.

        Raises:
            RuntimeError: the stage cannot be recorded.
        """
        kind = (kind, forced_backend(), torch.is_inference_mode_enabled())
        with self._lock:
            if self._watch is None or self._watch.has_hooks():
                self.not_replayed += 1
                return None
            is_new, recording = kind not in self._found, self._found.get(kind)
            self._found[kind] = recording
            self._found.move_to_end(kind)
            if is_new:
                if len(self._found) > MOST_GRAPHS:
                    self._found.popitem(last=False)
                self.not_replayed += 1
                return None
            if recording is None:
                recording = self._found[kind] = self._recorded(stage, make())
            self._wait_for_other_streams(recording)
            fill(*recording.inputs)
            recording.replay()
            self.replayed += 1
            return pytree.tree_map_only(Tensor, Tensor.clone, recording.outputs)

    def _recorded(self, stage: Stage, inputs: tuple[Tensor, ...]) -> Recording:
        try:
            with _one_at_a_time:
                if self._recorder is None:
                    self._recorder = Recorder(inputs[0].device)
                recording: Recording = self._recorder.record(stage, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise RuntimeError(f"graphs: no CUDA graph can hold this model; patch it without: {error}") from error
        self.recorded += 1
        return recording

    def _wait_for_other_streams(self, recording: Recording) -> None:
        """Two must not work on the same tensors at once."""
        device = recording.inputs[0].device
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            for tensor in recording.inputs:
                tensor.record_stream(stream)


def has_graphs(device_type: str) -> bool:
    """Whether there are graphs for such a device."""
    return device_type in DEVICES


class Recorder:
    """Records on a GPU. All graphs of one take their memory from the same pool: they must not be replayed at once."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # Not the one that torch shares between all graphs and devices; and another for what is not recorded.
            self._stream, self._beside = torch.cuda.Stream(), torch.cuda.Stream()

    def record(self, stage: Stage, inputs: tuple[Tensor, ...]) -> Recording:
        """Run a stage, so that what is compiled, tuned or allocated once is so before; then record it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._beside):
                stage(*inputs)
            torch.cuda.current_stream().wait_stream(self._beside)
            # A workspace of cuBLAS that outlives a recording is its pool's, and would serve another stream's work too.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with (
                    torch.cuda.stream(self._stream),  # torch does not go back to the caller's where recording fails
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    outputs = stage(*inputs)
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return Recording(inputs, outputs, graph.replay)
