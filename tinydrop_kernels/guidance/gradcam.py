"""The gradient of Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1), by the cheapest exact method."""

import copy
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tinydrop_kernels.ops.registry import HALF
from tinydrop_kernels.ops.saliency import top_classes
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.torch_internals import eager, transforms

Head = Callable[..., Tensor]  # from features and constant arguments to logits (batch, classes)


class Cam(enum.Enum):
    """How the gradient of a logit with respect to the last feature map is computed."""

    ROWS = "constant: one row of weights per class"
    POOLED = "constant over the map: one backward pass through the head at the pooled vector"
    HEAD = "one backward pass through the head"
    LAST_BLOCK = "one backward pass through the last block and the head"


class FeatureLayout(NamedTuple):
    """How a model lays out its last feature map."""

    rows: int
    columns: int
    flat: bool  # (batch, prefix tokens + cells, channels) if true, otherwise a map with rows and columns
    channels_last: bool = False  # (batch, rows, columns, channels) if true, otherwise (batch, channels, rows, columns)
    prefix_tokens: int = 0

    def cells(self, features: Tensor) -> Tensor:
        """Return a view ``(batch, cells, channels)`` of features in the model's own layout."""
        if self.flat:
            return features[:, self.prefix_tokens :]
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)

    def single_cell(self, cell: Tensor) -> Tensor:
        """Return one cell ``(batch, 1, channels)`` as a feature map in the model's own layout."""
        if self.flat:
            return cell
        return cell[:, None] if self.channels_last else cell.transpose(1, 2)[..., None]


class SplitTransformer:
    """A transformer cut before its last block. There the patches still affect the class token.

    It shares weights and modules with the model. It stores nothing between calls, so many threads may use it at once.
    """

    def __init__(self, model: TimmModule):
        self._model = model
        *_, last = model.blocks._modules
        blocks = _with_children(model.blocks, {last: _Stop()})
        self._trunk = _with_children(model, {"blocks": blocks, "norm": nn.Identity()})

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of the last block: tokens, and other arguments such as rotations and biases."""
        tokens, args, kwargs = self._trunk.forward_features(images)
        return tokens, args, kwargs

    def rest(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits from the last block's arguments. Norm and head run in float32 or float64."""
        return in_full_precision(self.head, self._model.blocks[-1](tokens, *args, **kwargs))

    def head(self, tokens: Tensor) -> Tensor:
        """Return logits from the output tokens of the last block."""
        logits: Tensor = self._model.forward_head(self._model.norm(tokens))
        return logits


def in_full_precision(head: Head, features: Tensor) -> Tensor:
    """Run a head whose weights are float32 or float64. Half-precision features are cast; autocast is disabled."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float() if features.dtype in HALF else features)


def head_modules(model: TimmModule, head: Head, features: Tensor) -> list[str]:
    """Return the names of the model's direct children that the head calls."""
    called, names = set[nn.Module](), {module: name for name, module in model.named_children()}
    handles = [child.register_forward_pre_hook(lambda module, _: called.add(module)) for child in names]
    try:
        in_full_precision(head, features)
    finally:
        for handle in handles:
            handle.remove()
    return [names[module] for module in names if module in called]


class _Stop(nn.Module):
    """A replacement of the last block that returns its arguments."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        return tokens, args, kwargs


def _with_children(module: TimmModule, children: dict[str, nn.Module]) -> TimmModule:
    """Return a copy that shares everything with ``module`` except these children."""
    view = copy.copy(module)
    view._modules = module._modules | children
    return view


@eager  # torch.compile would ignore inference_mode(False), and autograd refuses inference tensors
def class_gradient(
    head: Head, features: Tensor, classes: int, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Return logits, and the gradient of a mixture of them with respect to the features.

    The mixture is ``sum_k p_k / p_1 * logit_k`` over the ``classes`` most probable classes. The probabilities ``p`` are
    treated as constants. Because of the factor ``1 / p_1``, the mixture of one class is that class's logit. Ties go to
    the lower class. If the model has fewer classes, all are used.

    Args:
        head: maps ``features``, ``*args`` and ``**kwargs`` to logits, each image independently.
        features: floating ``(batch, ...)``.
        classes: number of classes in the mixture.
        args, kwargs: constants, which may contain tensors at any depth.

    Returns:
        Logits ``(batch, num_classes)``, and the gradient in the features' shape and dtype. Neither has a graph.
    """

    def mixture(features: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(features, *tree_map(_without_graph, args), **tree_map(_without_graph, kwargs or {}))
        index, share = top_classes(logits.detach(), classes)
        return (logits.gather(1, index) * share).sum(), logits

    with torch.inference_mode(False), torch.enable_grad():
        features = _without_graph(features)
        if transforms():  # torch.func does not allow requires_grad_() within its transforms
            gradient, logits = torch.func.grad(mixture, has_aux=True)(features)
        else:
            total, logits = mixture(features.requires_grad_())
            (gradient,) = torch.autograd.grad(total, features)
    return logits.detach(), gradient


def _without_graph(leaf: Any) -> Any:
    """Return a tensor without a graph that autograd may save, cloned if necessary. Return any other object as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


def kind_of_head(head: Head, features: Tensor, layout: FeatureLayout) -> tuple[Cam, Tensor | None]:
    """Find how the gradient of a head can be computed, by running the head.

    The head is tried on noise of three scales, from weak to strong, because some heads are nearly linear at one scale.

    Args:
        head: a head with float32 weights.
        features: float32 features of the model.
        layout: layout of ``features``, without prefix tokens.

    Returns:
        The kind of gradient, and the rows ``(classes, channels)`` for ``Cam.ROWS``. The rows are None for other kinds.
    """
    channels = layout.cells(features).shape[2]
    noise = torch.randn(4, *features.shape[1:], generator=torch.Generator().manual_seed(0), dtype=features.dtype)
    noise = noise.to(features.device) * features.std()
    cam, rows = Cam.ROWS, None
    try:
        offset = head(layout.single_cell(features.new_zeros(1, 1, channels)))
        unit = torch.eye(channels, dtype=features.dtype, device=features.device)
        rows = head(layout.single_cell(unit[:, None])) - offset
        for scale in (0.3, 3.0, 30.0):
            mean = layout.cells(scale * noise).mean(dim=1, keepdim=True)
            logits = head(scale * noise)
            if not agree(head(layout.single_cell(mean)), logits, logits - offset):
                return Cam.HEAD, None
            if not agree(mean[:, 0] @ rows + offset, logits, logits - offset):
                cam = Cam.POOLED
    except (RuntimeError, ValueError):  # the head does not accept a map of one cell
        return Cam.HEAD, None
    return cam, rows.T.contiguous() if cam is Cam.ROWS else None


def agree(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Return whether two tensors differ by at most 0.1 % of the largest absolute value of ``scale``."""
    return bool((a - b).abs().max() <= 1e-3 * scale.abs().max())
