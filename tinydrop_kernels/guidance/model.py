"""The guidance model: a tiny classifier whose confidence decides on an exit and whose Grad-CAM ranks the patches."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from tinydrop_kernels.guidance.folding import copied, folded
from tinydrop_kernels.guidance.gradcam import (
    Cam,
    FeatureLayout,
    SplitTransformer,
    agree,
    class_gradient,
    head_modules,
    in_full_precision,
    kind_of_head,
)
from tinydrop_kernels.normalization import per_channel
from tinydrop_kernels.ops.registry import HALF
from tinydrop_kernels.ops.saliency import saliency_map
from tinydrop_kernels.ops.types import Saliency, TimmModule
from tinydrop_kernels.policy.fingerprint import Fingerprint, fingerprint_of
from tinydrop_kernels.torch_internals import eager, for_any_batch, ieee_float32

DEFAULT_GUIDANCE = "efficientformer_l1.snap_dist_in1k"
PLAIN_CAM = Saliency()
PART = 8  # images per thread and pass on CPU; the activations of more do not fit into the cache (docs/decisions.md)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel


class GuidanceError(RuntimeError):
    """The error for a model that cannot be used as guidance model. Its message says why.

    Example:
        >>> tdk.Guidance(torch.nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        tinydrop_kernels.guidance.model.GuidanceError: guidance: got Linear, expected a timm classifier...
    """


class GuidanceOutput(NamedTuple):
    """The output of the guidance model for a batch. Either ``features`` or ``saliency`` is None."""

    logits: Tensor  # (batch, classes), float32 or float64
    features: Tensor | None  # (batch, cells, channels), any strides; ``Guidance.class_weight`` weights them
    saliency: Tensor | None  # float32 (batch, rows, columns), the final map


class Guidance(nn.Module):
    """A timm classifier with its own preprocessing, and Grad-CAM on its last feature map.

    The way to compute the gradient is found by running the model's own ``forward_head``, not from its class:

    * A head that is affine in the average-pooled features has a constant gradient, which is measured once. This covers
      BatchNorm and averaged twin heads.
    * A head that depends on the map only through its average needs one backward pass at the pooled vector.
    * Any other head needs one backward pass through the head.
    * A model with a class token needs one backward pass through the last block and the head, because the gradient on
      the patches of the last layer is zero.

    The model is copied, so later changes of the original do not reach the guidance model. BatchNorm is folded into the
    convolutions of the copy (:mod:`guidance.folding`). In half precision the head stays in float32, so that the
    confidence does not depend on the rounding of logits. Many threads may call the same instance.

    Args:
        model: a timm classifier with ``forward_features`` and ``forward_head``.
        input_size: (height, width) of the images it is given, or one number for both. The default is that of its fixed
            patch embedding or its ``pretrained_cfg``. A smaller size costs less and may change the accuracy.
        mean, std: per channel normalisation that it expects; by default those of its ``pretrained_cfg``.
        compile: whether to compile the model with ``torch.compile`` up to its last feature map. The first batch, the
            first batch of one image, and the first batch on another device or in another dtype then take about a
            minute each.

    Raises:
        GuidanceError: The model lacks one of the two methods, classes, a feature map, or logits ``(batch,
            num_classes)``, or it does not accept images of this size.
        ValueError: The size is below 1.

    Example:
        >>> guide = tdk.Guidance(guidance, input_size=160)
        >>> guide(images).logits.shape
        torch.Size([2, 10])
        >>> guide.feature_size
        (5, 5)
    """

    model: TimmModule
    num_classes: int
    in_chans: int
    input_size: tuple[int, int]  # height and width of the images that it is given
    feature_size: tuple[int, int]  # rows and columns of its last feature map
    cam: Cam
    class_weight: Tensor  # (num_classes, channels); None unless cam is Cam.ROWS
    compiled: bool
    fingerprint: Fingerprint  # of the model before it was folded

    def __init__(
        self,
        model: TimmModule,
        input_size: int | tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        compile: bool = False,
    ):
        super().__init__()
        kind = type(model).__name__
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise GuidanceError(
                f"guidance: got {kind}, expected a timm classifier (a module with forward_features and forward_head)"
            )
        if not getattr(model, "num_classes", 0):
            raise GuidanceError(f"guidance: got {kind} with num_classes=0, expected a classifier")
        config = resolve_model_data_config(model)
        self.num_classes = model.num_classes  # _checked_logits compares it with the head's output
        self.fingerprint = fingerprint_of(model, self.num_classes)  # computed here, because folding changes the weights
        self.in_chans = getattr(model, "in_chans", config["input_size"][0])
        fixed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = fixed_size or config["input_size"][1:] if input_size is None else input_size
        self.input_size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ValueError(f"input_size: got {input_size}, expected a number >= 1, or a height and a width")
        self.mean = per_channel(mean or config["mean"], self.in_chans)
        self.std = per_channel(std or config["std"], self.in_chans)
        self.compiled = compile
        self._rescalings: dict[Any, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode(False):  # because autograd refuses tensors made in inference mode
            self.model = copied(model).eval().requires_grad_(False)
            self._probe()
        self.eval()

    def at_size(self, input_size: tuple[int, int]) -> "Guidance":
        """Return the same guidance model for images of another size, or itself if the size is its own.

        Raises:
            GuidanceError: The model does not accept images of this size.
        """
        if input_size == self.input_size:
            return self
        other = Guidance(self.model, input_size, self.mean, self.std, self.compiled)
        other.fingerprint = self.fingerprint
        return other

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        saliency: Saliency = PLAIN_CAM,
    ) -> GuidanceOutput:
        """Return logits and what is needed for the saliency map.

        Args:
            images: floating ``(batch, in_chans, height, width)`` of any size, in the model's dtype. They are resized to
                ``input_size``, bilinearly with antialiasing.
            mean, std: per channel normalisation of the images; by default the guidance model's own.
            saliency: what makes a cell salient. It is ignored for ``Cam.ROWS``, whose map :func:`ops.select_tokens`
                computes together with the selection.

        Returns:
            A :class:`GuidanceOutput` without a graph. It has ``features`` for ``Cam.ROWS`` and ``saliency`` otherwise.
        """
        images = self._prepared(images, mean, std)
        trunk = for_any_batch(type(self)._trunk) if self.compiled else type(self)._trunk
        if images.is_cpu and self._split is None:
            parts = images.tensor_split(math.ceil(len(images) / (PART * torch.get_num_threads())) or 1)
            features, args, kwargs = torch.cat([trunk(self, part)[0] for part in parts]), (), {}
        else:
            features, args, kwargs = trunk(self, images)
        cells = self._layout.cells(features)
        if self.cam is Cam.ROWS:
            return GuidanceOutput(self._head(features), cells, None)
        if self.cam is Cam.POOLED:
            logits = self._head(features)
            pooled = self._layout.single_cell(cells.mean(dim=1, keepdim=True))
            _, gradient = class_gradient(self._head, pooled, saliency.classes)
        else:
            logits, gradient = class_gradient(self._head, features, saliency.classes, args, kwargs)
        return GuidanceOutput(
            logits, None, saliency_map(self._layout.cells(gradient), cells, self.feature_size, saliency)
        )

    @torch.no_grad()
    def pre_logits(
        self, images: Tensor, mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> Tensor:
        """Return the pooled features before the classifier, ``(batch, dim)``, in float32 or float64.

        Args:
            images, mean, std: as for a call.
        """
        features = self.model.forward_features(self._prepared(images, mean, std))
        return in_full_precision(partial(self.model.forward_head, pre_logits=True), features)

    def _trunk(self, images: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return the feature map of Grad-CAM, and the other arguments of :meth:`_head`."""
        if self._split is not None:
            return self._split.trunk(images)
        return self.model.forward_features(images), (), {}

    def _head(self, features: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits from the feature map, in float32 or float64."""
        if self._split is not None:
            return self._split.rest(features, *args, **kwargs)
        return in_full_precision(self.model.forward_head, features)

    def _prepared(self, images: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
        """Return the images in the size, normalisation and memory format that the model expects."""
        if images.shape[-2:] != self.input_size:
            # In float32, because torch has no antialiasing in half precision on CPU.
            small = F.interpolate(
                images.float(), size=self.input_size, mode="bilinear", align_corners=False, antialias=True
            )
            images = small.to(images.dtype)
        source = per_channel(mean or self.mean, self.in_chans), per_channel(std or self.std, self.in_chans)
        wanted = self.mean, self.std
        if source != wanted:
            key = source, wanted, images.device, images.dtype
            if key not in self._rescalings:  # kept, because a copy to a GPU at every call makes the host wait
                self._rescalings[key] = _rescaling(source, wanted, images.device, images.dtype)
            scale, offset = self._rescalings[key]
            images = images * scale + offset
        return images.contiguous(memory_format=torch.channels_last)  # faster convolutions (docs/decisions.md)

    @ieee_float32()
    @torch.no_grad()
    def _probe(self) -> None:
        """Find the layout of the feature map and the kind of the head by running the model. Then fold the model.

        The model runs in float32 without TF32, so that the result does not depend on its dtype or the user's settings.
        """
        own = next(self.model.parameters())
        dtype = own.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        model, kind = copy.deepcopy(self.model).float(), type(self.model).__name__
        noise = torch.randn(2, self.in_chans, *self.input_size, generator=torch.Generator().manual_seed(0))
        with torch.autocast(own.device.type, enabled=False):
            images = noise.to(own.device, torch.float32)
            try:
                features = model.forward_features(images)
            except Exception as error:
                raise GuidanceError(f"guidance: {kind} fails on images of {self.input_size}: {error}") from error
            self._layout = self._layout_of(features)
            self.feature_size = self._layout.rows, self._layout.columns
            logits = self._checked_logits(model, features)
            if self._layout.prefix_tokens:
                _check_split(model, images, logits)
                self.cam, rows = Cam.LAST_BLOCK, None
            else:
                self.cam, rows = kind_of_head(model.forward_head, features, self._layout)
            self.model = folded(self.model.to(wide), images.to(wide)).to(memory_format=torch.channels_last)
        self.register_buffer("class_weight", rows, persistent=False)
        self._split = SplitTransformer(self.model) if self.cam is Cam.LAST_BLOCK else None
        head = self.model.forward_head if self._split is None else self._split.head
        self._head_names = head_modules(self.model, head, features.to(wide))
        self.to(dtype)

    def _layout_of(self, features: Any) -> FeatureLayout:
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise GuidanceError(f"guidance: {type(self.model).__name__} has no feature map, which Grad-CAM needs")
        if features.ndim == 3:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
            rows, columns = _rows_and_columns(features.shape[1] - prefix, self.input_size)
            return FeatureLayout(rows, columns, flat=True, prefix_tokens=prefix)
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        rows, columns = features.shape[1:3] if channels_last else features.shape[2:4]
        return FeatureLayout(rows, columns, flat=False, channels_last=channels_last)

    def _checked_logits(self, model: TimmModule, features: Tensor) -> Tensor:
        """Return the head's logits. Raise GuidanceError if the head fails or their shape is wrong."""
        head = f"the head of {type(model).__name__}"
        try:
            logits = model.forward_head(features)
        except Exception as error:
            raise GuidanceError(f"guidance: {head} fails on its own features: {error}") from error
        expected = (len(features), self.num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise GuidanceError(f"guidance: {head} gives {got}, expected logits of shape (batch, {self.num_classes})")
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guidance":
        with torch.inference_mode(False):
            new = type(self).__new__(type(self))
            memo[id(self)] = new
            vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Guidance":
        """Apply ``to``, ``half`` or a similar call, but keep the head in float32 instead of half precision."""
        heads = [self.model.get_submodule(name) for name in self._head_names]
        wide = {id(tensor) for head in heads for tensor in (*head.parameters(), *head.buffers())}

        def apply(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device, torch.float32) if id(tensor) in wide and moved.dtype in HALF else moved

        with torch.inference_mode(False):
            nn.Module._apply(self, apply, recurse)
        return self


def _check_split(model: TimmModule, images: Tensor, logits: Tensor) -> None:
    """Raise GuidanceError if a transformer with a class token cannot be cut before its last block."""
    try:
        split = SplitTransformer(model)
        tokens, args, kwargs = split.trunk(images)
        again, _ = class_gradient(split.rest, tokens, 1, args, kwargs)
        if not agree(again, logits, logits):
            raise ValueError("its last block, norm and head do not reproduce its logits")
    except Exception as error:
        raise GuidanceError(
            f"guidance: {type(model).__name__} has a class token, but its Grad-CAM cannot be computed: {error}"
        ) from error


def _rows_and_columns(cells: int, input_size: tuple[int, int]) -> tuple[int, int]:
    rows = round((cells * input_size[0] / input_size[1]) ** 0.5)
    if rows < 1 or cells % rows:
        raise GuidanceError(f"guidance: {cells} cells do not form a grid with the aspect ratio of {input_size} images")
    return rows, cells // rows


@eager  # torch.compile would ignore inference_mode(False), and autograd refuses inference tensors
def _rescaling(
    source: Statistics, wanted: Statistics, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the scale and offset ``(channels, 1, 1)`` that turn one normalisation (mean, std) into another."""
    with torch.inference_mode(False):
        (source_mean, source_std), (mean, std) = torch.tensor((source, wanted), dtype=torch.float64)[..., None, None]
        scale, offset = source_std / std, (source_mean - mean) / std
        return scale.to(device, dtype), offset.to(device, dtype)
