"""Folding of the guidance model: fewer modules that compute the same logits.

BatchNorm is folded into the convolution before it, and parallel branches into one convolution. On CPU, linear layers
and 1 x 1 convolutions get prepacked weights. The same operator computes a GELU that follows (:mod:`ops.onednn`).

Which module follows which is observed by running the model, because its class does not say. The result is compared with
the original model, and the original is used if they differ.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import GELU
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tinydrop_kernels.guidance.gradcam import agree
from tinydrop_kernels.ops.onednn import is_pointwise, run_prepacked
from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.torch_internals import has_hooks


def copied(model: TimmModule) -> TimmModule:
    """Return a deep copy with empty caches of attention biases, because deepcopy refuses tensors with a graph."""
    caches = [vars(module).get("attention_bias_cache") for module in model.modules()]
    return copy.deepcopy(model, {id(cache): {} for cache in caches if cache})


@torch.no_grad()
def folded(model: TimmModule, images: Tensor) -> TimmModule:
    """Return a folded copy, or the model itself if the copy computes something else.

    Args:
        model: a timm classifier in eval mode, in float32 or float64.
        images: noise ``(batch, channels, height, width)`` on which the two are compared.
    """
    wanted = model.forward_features(images)
    logits = model.forward_head(wanted)
    try:
        candidate = reparameterize_model(copied(model))  # merges branches of RepVGG, RepViT, FastViT and LeViT
        for convolution, norm in _pairs(candidate, images, lambda module: type(module) is nn.Conv2d, _is_norm):
            _fold(candidate, convolution, norm)
        for layer, gelu in _pairs(candidate, images, _is_linear, _is_gelu):
            layer.forward = partial(run_prepacked, layer, activation="gelu")
            _replace(candidate, gelu, nn.Identity())
        for layer in filter(_is_linear, candidate.modules()):
            layer.forward = partial(run_prepacked, layer)
        features = candidate.forward_features(images)
        same = agree(features, wanted, wanted) and agree(candidate.forward_head(features), logits, logits)
    except Exception:  # timm calls any method named fuse, which may mean something else
        return model
    return candidate if same else model


def _pairs(
    model: TimmModule, images: Tensor, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> list[tuple[Any, Any]]:
    """Return pairs of modules where the second takes the output of the first. Both run once and have no hooks."""
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}  # holds the tensor, so that its id is not reused
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls, handles = dict[nn.Module, int](), []

    def called(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if is_first(module):
            outputs[id(output)] = module, output, output._version
        elif id(arguments[0]) in outputs:
            first, tensor, version = outputs[id(arguments[0])]
            if tensor._version == version:  # otherwise the output was changed in place
                pairs.append((first, module))

    for module in model.modules():
        if not has_hooks(module) and (is_first(module) or is_second(module)):
            handles.append(module.register_forward_hook(called))
    try:
        model.forward_head(model.forward_features(images))
    finally:
        for handle in handles:
            handle.remove()
    return [(first, second) for first, second in pairs if calls[first] == calls[second] == 1]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _is_linear(module: nn.Module) -> bool:
    return (type(module) is nn.Linear or is_pointwise(module)) and "forward" not in vars(module)


def _is_gelu(module: nn.Module) -> bool:
    return type(module) in (nn.GELU, GELU) and getattr(module, "approximate", "none") == "none"


def _fold(model: TimmModule, convolution: nn.Conv2d, norm: Any) -> None:
    """Fold a norm into a convolution's weights. An activation that timm puts inside the norm stays in its place."""
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    parts = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    rest = nn.Identity() if not parts else parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    _replace(model, norm, rest)


def _replace(model: TimmModule, old: nn.Module, new: nn.Module) -> None:
    (name,) = (name for name, module in model.named_modules() if module is old)
    model.set_submodule(name, new)
