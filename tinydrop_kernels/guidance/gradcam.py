"""Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, section 3.1): the gradient, and how much of a model it needs."""

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

Head = Callable[..., Tensor]  # from the features, and what else it needs, to logits (batch, classes)


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
    flat: bool  # (batch, prefix tokens + cells, channels); otherwise the map has two dimensions
    channels_last: bool = False  # (batch, rows, columns, channels); otherwise (batch, channels, rows, columns)
    prefix_tokens: int = 0

    def cells(self, features: Tensor) -> Tensor:
        """``(batch, cells, channels)``, a view of the model's own layout."""
        if self.flat:
            return features[:, self.prefix_tokens :]
        return features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)

    def single_cell(self, cell: Tensor) -> Tensor:
        """One cell, ``(batch, 1, channels)``, as a map of the model's own layout."""
        if self.flat:
            return cell
        return cell[:, None] if self.channels_last else cell.transpose(1, 2)[..., None]


class SplitTransformer:
    """A transformer cut before its last block, where the patches still bear on the class token.

    It shares weights and modules with the model, and keeps nothing of a call: any number of threads may be in it.
    """

    def __init__(self, model: TimmModule):
        self._model = model
        *_, last = model.blocks._modules
        blocks = _with_children(model.blocks, {last: _Stop()})
        self._trunk = _with_children(model, {"blocks": blocks, "norm": nn.Identity()})

    def trunk(self, images: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the model hands to its last block: tokens, and the other arguments (rotations, biases)."""
        tokens, args, kwargs = self._trunk.forward_features(images)
        return tokens, args, kwargs

    def rest(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits from the last block's arguments, in float32 at least behind the block."""
        return in_full_precision(self.head, self._model.blocks[-1](tokens, *args, **kwargs))

    def head(self, tokens: Tensor) -> Tensor:
        """Logits from the last block's tokens."""
        logits: Tensor = self._model.forward_head(self._model.norm(tokens))
        return logits


def in_full_precision(head: Head, features: Tensor) -> Tensor:
    """The head, whose weights are in float32 at least, on features that may be in half precision; no autocast."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float() if features.dtype in HALF else features)


def head_modules(model: TimmModule, head: Head, features: Tensor) -> list[str]:
    """Names of the model's own children that the head calls."""
    called, names = set[nn.Module](), {module: name for name, module in model.named_children()}
    handles = [child.register_forward_pre_hook(lambda module, _: called.add(module)) for child in names]
    try:
        in_full_precision(head, features)
    finally:
        for handle in handles:
            handle.remove()
    return [names[module] for module in names if module in called]


class _Stop(nn.Module):
    """Stands in for the last block and hands its arguments out."""

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        return tokens, args, kwargs


def _with_children(module: TimmModule, children: dict[str, nn.Module]) -> TimmModule:
    """A copy that shares everything with ``module`` but these children."""
    view = copy.copy(module)
    view._modules = module._modules | children
    return view


@eager  # compiled, the copies are made in inference mode after all
def class_gradient(
    head: Head, features: Tensor, classes: int, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their mixture with respect to the features.

    The mixture is ``sum_k p_k / p_1 * logit_k`` over the ``classes`` most probable classes, whose probabilities ``p``
    are taken as constants: the positive factor ``1 / p_1`` keeps one class's gradient that of its logit. Ties go to
    the lower class; of fewer classes all are taken.

    Args:
        head: from ``features``, ``*args`` and ``**kwargs`` to logits; image by image.
        features: floating ``(batch, ...)``.
        classes: how many classes.
        args, kwargs: constants; tensors anywhere in them.

    Returns:
        logits ``(batch, num_classes)``, and the gradient in the features' shape and dtype; neither has a graph.
    """

    def mixture(features: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(features, *tree_map(_without_graph, args), **tree_map(_without_graph, kwargs or {}))
        index, share = top_classes(logits.detach(), classes)
        return (logits.gather(1, index) * share).sum(), logits

    with torch.inference_mode(False), torch.enable_grad():
        features = _without_graph(features)
        if transforms():  # in which no tensor can be made to require a gradient
            gradient, logits = torch.func.grad(mixture, has_aux=True)(features)
        else:
            total, logits = mixture(features.requires_grad_())
            (gradient,) = torch.autograd.grad(total, features)
    return logits.detach(), gradient


def _without_graph(leaf: Any) -> Any:
    """A tensor that autograd may save, also of one made under inference mode; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


def kind_of_head(head: Head, features: Tensor, layout: FeatureLayout) -> tuple[Cam, Tensor | None]:
    """Which gradient the head has, found by trying it; and, for ``Cam.ROWS``, the rows ``(classes, channels)``.

    It is tried on noise, weak and strong beside its real features: some heads are nearly linear for one of them.

    Args:
        head: in float32.
        features: float32, what the model's own images give.
        layout: of ``features``; without prefix tokens.
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
    except (RuntimeError, ValueError):  # a head that wants the map at its full size
        return Cam.HEAD, None
    return cam, rows.T.contiguous() if cam is Cam.ROWS else None


def agree(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether two tensors are equal to a thousandth of the largest of ``scale``."""
    return bool((a - b).abs().max() <= 1e-3 * scale.abs().max())
