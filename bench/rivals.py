"""Our patched model and its rivals, all built from one model with random weights."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from measure import CUDA, DEVICE, captured
from mixes import DISTINCT, SpreadConfidences, cost, dense_cost, policy_of, spread
from padded import PaddedDropping
from tome import TokenMerging, total_for
from torch import Tensor
from turns import Way

import tinydrop_kernels as tdk
from tinydrop_kernels.families import family_of
from tinydrop_kernels.families.flops import count_flops

# The order in which ways are built and warmed up. Compiled ways come last, because they take the longest.
EAGER = ("dense", "tome", "padded", "exits", "resolution", "onnx", "ours", "ours-prepacked")
WAYS = (*EAGER, "dense-graphed", "ours-graphed", "dense-compiled", "ours-compiled")
GPU_ALONE, CPU_ALONE = ("dense-graphed", "ours-graphed"), ("onnx", "ours-prepacked")
PATCH_OPTIONS: dict[str, Any] = {"": {}, "prepacked": {"prepack": True}}
PATCH_OPTIONS |= {"graphed": {"graphs": True}, "compiled": {"compile": True}}


class NotMeasured(Exception):
    """Raised if a way cannot be measured here. The message gives the reason."""


class Subject:
    """A model and its guidance model, with the variants that several batch sizes and mixes share.

    Args:
        name: the model's timm name.
        options: options of ``timm.create_model``.
        guidance: the guidance model's timm name. It gets the model's number of classes.
        guidance_size: input size of the guidance model, if not its own.
        dtype: dtype of both models.
    """

    def __init__(
        self, name: str, options: dict[str, Any], guidance: str, guidance_size: int | None, dtype: torch.dtype
    ):
        torch.manual_seed(0)
        with torch.device(DEVICE), torch.inference_mode(False):  # on a CPU, random weights take seconds
            self.dense = timm.create_model(name, **options).eval().requires_grad_(False).to(dtype)
            guide = timm.create_model(guidance, num_classes=self.dense.num_classes)
        self.guidance = tdk.Guidance(guide, guidance_size)
        self.guidance_flops = count_flops(self.guidance.model, (3, *self.guidance.input_size))
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def twin(self) -> Any:
        """Return a copy of the model that shares its tensors."""
        return copy.deepcopy(self.dense, {id(t): t for t in (*self.dense.parameters(), *self.dense.buffers())})

    def patched(self, mode: str) -> tuple[Any, SpreadConfidences]:
        """Return a patched twin, and the object that sets its guidance model's confidences."""

        def make() -> tuple[Any, SpreadConfidences]:
            model = tdk.patch(self.twin(), self.guidance, **PATCH_OPTIONS[mode])
            return model, SpreadConfidences(model, DISTINCT)

        return self._once(("patched", mode), make)

    def compiled(self) -> Callable[[Tensor], Tensor]:
        """Return the dense model through ``torch.compile``. Each batch size is compiled separately."""
        return self._once("compiled", lambda: torch.compile(self.dense, dynamic=False))

    def onnx(self, images: Tensor) -> Callable[[Tensor], Any]:
        """Return the dense model in ONNX Runtime, exported for a batch of this shape."""
        return self._once(("onnx", len(images)), lambda: _exported(self.dense, images))


@dataclass
class Case:
    """One model, batch size and mix. A round has ``DISTINCT`` images, or one batch if a batch is larger."""

    subject: Subject
    batch: int
    percent: int

    def __post_init__(self) -> None:
        dense, flops = self.subject.dense, self.subject.guidance_flops
        self.dtype = next(dense.parameters()).dtype
        self.policy = policy_of(dense, flops, self.percent)
        self.image_flops = cost(dense, flops, self.policy) / DISTINCT
        self.dense_flops = dense_cost(dense) // DISTINCT
        rounds = max(1, DISTINCT // self.batch)
        size = (dense.in_chans, *dense.patch_embed.img_size)
        self.batches = list(torch.randn(rounds, self.batch, *size, device=DEVICE).to(self.dtype))

    def way(self, name: str) -> Way:
        """Return the way of this name, one of ``WAYS``.

        Raises:
            NotMeasured: the way cannot be measured here.
        """
        if name in GPU_ALONE and not CUDA:
            raise NotMeasured("CUDA graphs need a GPU")
        if name in CPU_ALONE and CUDA:
            raise NotMeasured("it is for CPU")
        kind, _, mode = name.partition("-")
        makers = {"dense": self._dense, "ours": self._ours, "exits": self._exits, "padded": self._padded}
        makers |= {"tome": self._tome, "resolution": self._resolution, "onnx": self._onnx}
        return makers[kind](name, mode)

    def _dense(self, name: str, mode: str) -> Way:
        dense = self.subject.dense
        calls = {"": lambda: dense, "compiled": self.subject.compiled, "graphed": lambda: Graphed(dense)}
        return self._at_dense_cost(name, calls[mode](), captures=mode == "graphed")

    def _at_dense_cost(self, name: str, call: Callable[[Tensor], Any], captures: bool = False) -> Way:
        return Way(name, call, self.batches, self.batch, flops=lambda: self.batch * self.dense_flops, captures=captures)

    def _ours(self, name: str, mode: str) -> Way:
        return self._through(name, mode, self.policy)

    def _exits(self, name: str, mode: str) -> Way:
        if self.policy.tau is None:
            raise NotMeasured("no image exits in this mix")
        return self._through(name, mode, tdk.DropPolicy.cascade(self.policy.tau))

    def _through(self, name: str, mode: str, policy: tdk.DropPolicy) -> Way:
        model, confidences = self.subject.patched(mode)

        def turn_to(turn: int) -> None:
            model.tinydrop.policy = policy
            confidences.turn_to(turn)

        def flops() -> int:
            return model.tinydrop.report().flops

        alone = spread(1, DISTINCT)[:, 0].tolist() if self.batch == 1 else []
        exits = [policy.tau is not None and confidence > policy.tau for confidence in alone]
        return Way(name, model, self.batches, self.batch, turn_to, flops, exits, captures=mode == "graphed")

    def _padded(self, name: str, mode: str) -> Way:
        way = self._through(name, mode, self.policy)
        return replace(way, call=PaddedDropping(self.subject.dense, way.call), flops=None)

    def _tome(self, name: str, mode: str) -> Way:
        dense = self.subject.dense
        return Way(name, TokenMerging(dense, total_for(dense, self.image_flops)), self.batches, self.batch)

    def _resolution(self, name: str, mode: str) -> Way:
        """Return dense on small images. Resizing is not timed, because a user's loader would produce small images."""
        model = self.subject.twin()
        side = _nearest_side(model, self.image_flops)
        size = tuple(side * pixels for pixels in model.patch_embed.patch_size)
        model.set_input_size(img_size=size)
        small = [F.interpolate(images.float(), size=size, mode="bilinear").to(images.dtype) for images in self.batches]
        return Way(name, model, small, self.batch)

    def _onnx(self, name: str, mode: str) -> Way:
        if self.dtype != torch.float32:
            raise NotMeasured("ONNX Runtime computes in float32 on CPU")
        return self._at_dense_cost(name, self.subject.onnx(self.batches[0]))


class Graphed:
    """A model that is replayed from a CUDA graph. The graph is captured at the first call."""

    def __init__(self, model: Callable[[Tensor], Tensor]):
        self.model: Callable[[Tensor], Tensor] = model
        self.graph: Any = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.graph is None:
            self.images = images.clone()
            for _ in range(3):
                self.model(self.images)
            torch.cuda.synchronize()
            self.graph = captured(self._run)
        self.images.copy_(images)
        self.graph.replay()
        return self.out

    def _run(self) -> None:
        self.out = self.model(self.images)


def _nearest_side(model: Any, aim: float) -> int:
    """Return the side of the square grid whose FLOPs per image are closest to ``aim``."""
    family, largest = family_of(model), model.patch_embed.grid_size[0]
    return min(range(1, largest + 1), key=lambda side: abs(family.dense_flops(model, 1, (side, side)) - aim))


def _exported(model: Any, images: Tensor) -> Callable[[Tensor], Any]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx writes through it)
    except ImportError as error:
        raise NotMeasured(f"{error.name} is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with torch.inference_mode(False), torch.no_grad():
            torch.onnx.export(model, (images.clone(),), file, dynamo=True, external_data=True, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images.numpy()})
