"""What a user would pick instead, and ours: ways to answer, made from one model with random weights."""

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

# Eager ones first, compiled ones last: so they are built and warmed up.
EAGER = ("dense", "tome", "padded", "exits", "resolution", "onnx", "ours", "ours-prepacked")
WAYS = (*EAGER, "dense-graphed", "ours-graphed", "dense-compiled", "ours-compiled")
GPU_ALONE, CPU_ALONE = ("dense-graphed", "ours-graphed"), ("onnx", "ours-prepacked")
PATCH_OPTIONS: dict[str, Any] = {"": {}, "prepacked": {"prepack": True}}
PATCH_OPTIONS |= {"graphed": {"graphs": True}, "compiled": {"compile": True}}


class NotMeasured(Exception):
    """Why a way cannot be taken here."""


class Subject:
    """A model and its guidance, and whatever is made of them for more than one batch size or mix.

    Args:
        name: timm's.
        options: of ``timm.create_model``.
        guidance: timm's name of the guidance model, of as many classes.
        guidance_size: of its images, if not its own.
        dtype: of both.
    """

    def __init__(
        self, name: str, options: dict[str, Any], guidance: str, guidance_size: int | None, dtype: torch.dtype
    ):
        torch.manual_seed(0)
        with torch.device(DEVICE), torch.inference_mode(False):  # random weights take a CPU seconds
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
        """Another model with the same tensors."""
        return copy.deepcopy(self.dense, {id(t): t for t in (*self.dense.parameters(), *self.dense.buffers())})

    def patched(self, mode: str) -> tuple[Any, SpreadConfidences]:
        """A patched twin, and what sets its guidance's confidences."""

        def make() -> tuple[Any, SpreadConfidences]:
            model = tdk.patch(self.twin(), self.guidance, **PATCH_OPTIONS[mode])
            return model, SpreadConfidences(model, DISTINCT)

        return self._once(("patched", mode), make)

    def compiled(self) -> Callable[[Tensor], Tensor]:
        """The dense model through ``torch.compile``, anew for each batch size."""
        return self._once("compiled", lambda: torch.compile(self.dense, dynamic=False))

    def onnx(self, images: Tensor) -> Callable[[Tensor], Any]:
        """The dense model exported for such images, in ONNX Runtime."""
        return self._once(("onnx", len(images)), lambda: _exported(self.dense, images))


@dataclass
class Case:
    """One model, batch size and mix. A round is ``DISTINCT`` images, or one batch where that is more."""

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
        """One of ``WAYS``.

        Raises:
            NotMeasured: it cannot be taken here.
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
        """The images are already small when they come: a user's loader would make them so, for less than large ones."""
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
    """A model's replay in a CUDA graph, which is captured at the first call."""

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
    """Of the square grids the one at which an image costs as nearly so many FLOPs as can be."""
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
