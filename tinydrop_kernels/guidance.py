"""The guidance model: a tiny classifier that says what it sees, how sure it is, and where it looked."""

import copy
import enum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tinydrop_kernels.aliases import TimmModule

DEFAULT_GUIDANCE = "efficientformer_l1.snap_dist_in1k"


class GuidanceError(RuntimeError):
    """The model cannot guide."""


class Cam(enum.Enum):
    """How the gradient of a logit with respect to the last feature map is had."""

    ROWS = "constant: one row of weights per class"
    POOLED = "constant over the map: one backward pass through the head at the pooled vector"
    HEAD = "one backward pass through the head"
    LAST_BLOCK = "one backward pass through the last block and the head"


class Guided(NamedTuple):
    """What the guidance model says of a batch. Either ``features`` or ``saliency`` is None."""

    logits: Tensor  # (batch, classes)
    features: Tensor | None  # (batch, cells, channels), any strides: to be weighted by ``Guidance.class_weight``
    saliency: Tensor | None  # (batch, rows, columns): ready Grad-CAM


class Guidance(nn.Module):
    """A timm classifier with Grad-CAM on its last feature map (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1).

    How the gradient is had is found out by probing the model's own ``forward_head``, not from its class: a head that
    is affine in the average-pooled features has its weights read off at the unit vectors, which folds BatchNorm and
    averaged twin heads; a head that sees the map only through its average needs its gradient at one vector; for any
    other head, and for class tokens (whose gradient on the last layer's patches is zero), there is one backward pass
    through the head or the last block alone. The model is copied and its weights are read once, here: what is done to
    the original afterwards does not reach the guidance.

    Args:
        model: a timm model with ``forward_features`` and ``forward_head``.
        input_size: (height, width) it is fed; by default that of its ``pretrained_cfg`` or its fixed patch embedding.
        mean, std: per channel normalisation it wants; by default those of its ``pretrained_cfg``.

    Raises:
        GuidanceError: the model has no such methods, no classes or no feature map.
    """

    model: TimmModule
    num_classes: int
    in_chans: int
    input_size: tuple[int, int]  # of the images it is fed
    feature_size: tuple[int, int]  # of its last feature map
    cam: Cam
    _probing = False  # whether to check that the parts make the whole
    class_weight: Tensor  # (num_classes, channels); None unless cam is Cam.ROWS

    def __init__(
        self,
        model: TimmModule,
        input_size: tuple[int, int] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ):
        super().__init__()
        if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
            raise GuidanceError(
                f"guidance: got {type(model).__name__}, accepted is a timm classifier "
                "(a module with forward_features and forward_head)"
            )
        if not getattr(model, "num_classes", 0):
            raise GuidanceError(f"guidance: {type(model).__name__} has num_classes=0, accepted is a classifier")
        config = resolve_model_data_config(model)
        with torch.inference_mode(False):  # autograd refuses tensors made in inference mode
            self.model = copy.deepcopy(model).eval()
        self.num_classes = model.num_classes
        self.in_chans = getattr(model, "in_chans", config["input_size"][0])
        fixed_size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        self.input_size = tuple(input_size or fixed_size or config["input_size"][1:])
        self.mean = per_channel(mean or config["mean"], self.in_chans)
        self.std = per_channel(std or config["std"], self.in_chans)
        with torch.inference_mode(False):
            self._probe()
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Guided:
        """Classify and look.

        Args:
            images: floating ``(batch, in_chans, *input_size)``, normalised with ``mean`` and ``std``.
        """
        if self.cam is Cam.LAST_BLOCK:
            return self._guided_by_last_block(images)
        features = self.model.forward_features(images)
        logits = self.model.forward_head(features)
        if self.cam is Cam.ROWS:
            return Guided(logits, self._cells(features), None)
        if self.cam is Cam.POOLED:
            cells = self._cells(features)
            gradient, _ = self._class_gradient(self._native(cells.mean(dim=1, keepdim=True)))
            return Guided(logits, None, self._grad_cam(self._cells(gradient), cells))
        gradient, features = self._class_gradient(features)
        return Guided(logits, None, self._grad_cam(self._cells(gradient), self._cells(features)))

    def _guided_by_last_block(self, images: Tensor) -> Guided:
        """The layer is the input of the last block: there the patches still bear on the class token."""
        captured: dict = {}

        def capture(module, args, kwargs):
            captured["args"], captured["kwargs"] = args, kwargs

        hook = self.model.blocks[-1].register_forward_pre_hook(capture, with_kwargs=True)
        try:
            logits = self.model.forward_head(self.model.forward_features(images))
        finally:
            hook.remove()
        tokens, *args = captured["args"]
        args, kwargs = _detached(args), _detached(captured["kwargs"])

        def rest(tokens):
            again = self.model.forward_head(self.model.norm(self.model.blocks[-1](tokens, *args, **kwargs)))
            if self._probing and not _agree(again, logits, logits):
                raise GuidanceError("its last block, norm and head do not make its logits")
            return again

        gradient, tokens = self._class_gradient(tokens, rest)
        skip = self.model.num_prefix_tokens
        return Guided(logits, None, self._grad_cam(gradient[:, skip:], tokens[:, skip:]))

    @torch.compiler.disable  # torch 2.11 compiles the copy so that it is made in inference mode after all
    def _class_gradient(self, features: Tensor, head=None) -> tuple[Tensor, Tensor]:
        """Gradient of each image's top logit with respect to its ``features``, and the features without graph."""
        with torch.inference_mode(False), torch.enable_grad():
            features = _detached(features).requires_grad_()
            logits = (head or self.model.forward_head)(features)
            (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), features)
        return gradient, features.detach()

    def _grad_cam(self, gradient: Tensor, cells: Tensor) -> Tensor:
        """``relu(cells . mean gradient)``: ``(batch, rows, columns)`` from two ``(batch, cells, channels)``."""
        weight = gradient.float().mean(dim=1)
        return torch.einsum("blc,bc->bl", cells.float(), weight).relu().view(-1, *self.feature_size)

    def _cells(self, features: Tensor) -> Tensor:
        """``(batch, cells, channels)``, a view of the model's own layout."""
        if features.ndim == 3:
            return features
        return features.flatten(1, 2) if self._channels_last else features.flatten(2).transpose(1, 2)

    def _native(self, cell: Tensor) -> Tensor:
        """One cell, ``(batch, 1, channels)``, in the model's own layout."""
        if self._feature_ndim == 3:
            return cell
        return cell[:, None] if self._channels_last else cell.transpose(1, 2)[..., None]

    @torch.no_grad()
    def _probe(self) -> None:
        """Find the layout of the feature map and the kind of the head by trying them."""
        self.register_buffer("class_weight", None, persistent=False)
        weights = next(self.model.parameters())
        noise = torch.Generator().manual_seed(0)
        image = torch.randn(2, self.in_chans, *self.input_size, generator=noise).to(weights.device, weights.dtype)
        kind = type(self.model).__name__
        try:
            features = self.model.forward_features(image)
        except Exception as error:
            raise GuidanceError(f"guidance: {kind} fails on images of {self.input_size}: {error}") from error
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise GuidanceError(f"guidance: {kind} has no feature map that Grad-CAM could weigh")
        self._feature_ndim = features.ndim
        self._channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        prefix = getattr(self.model, "num_prefix_tokens", 0) if features.ndim == 3 else 0
        if features.ndim == 3:
            self.feature_size = _rows_and_columns(features.shape[1] - prefix, self.input_size)
        else:
            first = 1 if self._channels_last else 2
            self.feature_size = (features.shape[first], features.shape[first + 1])
        if prefix:
            self.cam = Cam.LAST_BLOCK
            self._probing = True
            try:
                self._guided_by_last_block(image)
            except Exception as error:
                raise GuidanceError(f"guidance: {kind} has a class token, and no Grad-CAM of it: {error}") from error
            finally:
                self._probing = False
            return
        # In float32 whatever the model's own dtype, so that the verdict and the weights do not hang on it.
        model = self.model if weights.dtype == torch.float32 else copy.deepcopy(self.model).float()
        self.cam, class_weight = self._kind_of_head(model.forward_head, features.float())
        if class_weight is not None:
            self.class_weight = class_weight.to(weights.dtype)

    def _kind_of_head(self, head, features: Tensor) -> tuple[Cam, Tensor | None]:
        """Try the head on noise, weak and strong beside its real features: some are nearly linear for one of them."""
        channels = self._cells(features).shape[2]
        noise = torch.randn(4, *features.shape[1:], generator=torch.Generator().manual_seed(0)).to(features.device)
        spread = features.std()
        cam, rows = Cam.ROWS, None
        try:
            offset = head(self._native(noise.new_zeros(1, 1, channels)))
            rows = head(self._native(torch.eye(channels, device=features.device)[:, None])) - offset
            for scale in (0.3, 3.0, 30.0):
                cells = scale * spread * noise
                mean = self._cells(cells).mean(dim=1, keepdim=True)
                logits = head(cells)
                if not _agree(head(self._native(mean)), logits, logits - offset):
                    return Cam.HEAD, None
                if not _agree(mean[:, 0] @ rows + offset, logits, logits - offset):
                    cam = Cam.POOLED
        except (RuntimeError, ValueError):  # a head that wants the map at its full size
            return Cam.HEAD, None
        return cam, rows.T.contiguous() if cam is Cam.ROWS else None


def _agree(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-3 * scale.abs().max())


def per_channel(statistic: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel; timm keeps three of colour for models of other channels, whose average then serves."""
    values = tuple(statistic)
    return values if len(values) == channels else (sum(values) / len(values),) * channels


@torch.compiler.disable
def _detached(tree):
    """Copies that autograd may save, also of tensors made under inference mode."""
    with torch.inference_mode(False):
        return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def _rows_and_columns(cells: int, input_size: tuple[int, int]) -> tuple[int, int]:
    rows = round((cells * input_size[0] / input_size[1]) ** 0.5)
    if rows < 1 or cells % rows:
        raise GuidanceError(f"guidance: {cells} cells do not make a grid of the shape of a {input_size} image")
    return rows, cells // rows


def match_statistics(
    source: tuple[tuple[float, ...], tuple[float, ...]], wanted: tuple[tuple[float, ...], tuple[float, ...]]
) -> tuple[Tensor, Tensor] | None:
    """Scale and offset, ``(channels, 1, 1)``, from images normalised with one (mean, std) to another; None if equal."""
    if source == wanted:
        return None
    (source_mean, source_std), (mean, std) = (tuple(torch.tensor(s) for s in pair) for pair in (source, wanted))
    return (source_std / std)[:, None, None], ((source_mean - mean) / std)[:, None, None]


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images at the guidance model's input size: bilinear, antialiased where that shrinks them."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    # in float32: on CPU there is no antialiasing in half precision
    small = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return small.to(images.dtype)
