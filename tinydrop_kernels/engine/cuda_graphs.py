"""CUDA graphs of a patched model's work on the device, recorded once for each kind of call and then replayed.

At small batches the host takes longer to launch a ViT's kernels than a GPU takes to run them. A graph launches all of
them at once, but with fixed addresses and sizes, and without a read-back. So there are two stages, one before and one
after the single read-back of a batch:

* ``front``: guidance, selection and packing, with one graph for each shape of images;
* ``blocks``: the target's blocks and head, with one graph for each bucket (:mod:`tinydrop_kernels.engine.buckets`).

The first call of a kind runs without a graph. The second call records one, which takes as long as a few calls. Each
stage keeps at most ``MOST_GRAPHS`` graphs and discards the least recently used. The graphs of a stage share their
memory, so together they take little more than the largest of them.

Experimental: tests replay recordings on a CPU, but no GPU has recorded one yet.
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
MOST_GRAPHS = 16  # per stage
# Larger batches run without graphs, because the device then takes longer than the host needs to launch the kernels.
# Both limits are estimates from numbers of launches and FLOPs. They were not measured.
MOST_IMAGES = 64
MOST_ROWS = 8192

Stage = Callable[..., Any]  # takes its input tensors, returns tensors in any nesting of tuples
_one_at_a_time = threading.Lock()  # because only one graph per process can be recorded at a time


class Recording(NamedTuple):
    """A recorded stage. ``replay`` runs it on the current values of ``inputs`` and overwrites ``outputs``."""

    inputs: tuple[Tensor, ...]
    outputs: Any
    replay: Callable[[], None]


class Graphs:
    """The graphs of a patched model, as ``model.tinydrop.graphs``. Copies and pickles are empty."""

    def __init__(self) -> None:
        self.front = StageGraphs()
        self.blocks = StageGraphs()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, ()

    def __str__(self) -> str:
        return f"guidance, selection and packing: {self.front}; blocks and head: {self.blocks}"

    def clear(self) -> None:
        """Discard all graphs and free their memory."""
        self.front.clear()
        self.blocks.clear()


class StageGraphs:
    """The graphs of one stage. Several threads may use them, each on its own stream."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._watch: Watch | None = None
        self._pointers: list[int] = []
        self._recorder: Any = None
        self._stream: Any = None  # the stream of the last replay
        self.recorded = self.replayed = self.not_replayed = 0

    def __str__(self) -> str:
        return f"{self.recorded} recorded, {self.replayed} calls replayed, {self.not_replayed} not"

    def clear(self) -> None:
        """Discard all graphs of the stage."""
        with self._lock:
            self._found.clear()
            self._recorder = None

    def check(self, watch: Watch) -> None:
        """Discard all recordings if a module, weight or mode of the model was exchanged after they were made.

        A graph reads weights from their addresses at the time of recording, and runs no Python code. Changes of weights
        in place keep the addresses, so the recordings stay.

        Args:
            watch: the watch on the model that the stage runs. A new watch means that the model has changed.
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
        """Return ``stage(*inputs)`` in new tensors; None if the caller must run the stage without a graph.

        Call :meth:`check` first.

        Args:
            kind: a key. One graph serves all calls with an equal key.
            stage: a function that depends on its inputs alone and always runs the same kernels.
            make: returns input tensors with values that the stage can run on.
            fill: writes this call's inputs to those tensors.

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
        """Make this stream wait for the stream of the last replay, because replays share their buffers."""
        device = recording.inputs[0].device
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            for tensor in recording.inputs:
                tensor.record_stream(stream)


def has_graphs(device_type: str) -> bool:
    """Return whether devices of this type have graphs."""
    return device_type in DEVICES


class Recorder:
    """A recorder of graphs on a GPU. Its graphs share a memory pool, so no two may be replayed at the same time."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # One stream to record on, because torch's default one is shared by all graphs and devices. Another one to
            # warm up on.
            self._stream, self._beside = torch.cuda.Stream(), torch.cuda.Stream()

    def record(self, stage: Stage, inputs: tuple[Tensor, ...]) -> Recording:
        """Warm a stage up, so that kernels are compiled and tuned before, and record it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._beside):
                stage(*inputs)
            torch.cuda.current_stream().wait_stream(self._beside)
            # Clear cuBLAS's workspaces before and after, because a workspace made while recording lies in the graph's
            # memory pool. Otherwise work on another stream might use it too.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                with (
                    torch.cuda.stream(self._stream),  # because torch does not restore the stream if recording fails
                    torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
                ):
                    outputs = stage(*inputs)
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return Recording(inputs, outputs, graph.replay)
