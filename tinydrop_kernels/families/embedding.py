"""The step from images to tokens, for the families whose stem is timm's ``PatchEmbed``.

``PatchEmbed`` is a convolution whose stride equals its kernel size, so each token depends on the pixels of one patch
alone. Only the kept patches are projected (:func:`ops.embed_tokens`). A stem that does more runs on the whole image.
The kept tokens are then gathered from its output.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from tinydrop_kernels import ops
from tinydrop_kernels.families.grids import resampled_positions
from tinydrop_kernels.ops.types import Grid, TimmModule
from tinydrop_kernels.torch_internals import has_hooks


def embeds_kept_only(model: TimmModule, with_norm: bool = False) -> bool:
    """Return whether the patch embedding is a plain projection, so that dropped patches can skip it.

    Args:
        model: a model with ``patch_embed``.
        with_norm: whether to allow a ``patch_embed.norm``, for families that call the norm themselves.
    """
    patch_embed = model.patch_embed
    if type(patch_embed) is not PatchEmbed or patch_embed.dynamic_img_pad:
        return False
    passed_over = [patch_embed, patch_embed.proj, *([] if with_norm else [patch_embed.norm])]
    plain = type(patch_embed.proj) is nn.Conv2d and (with_norm or type(patch_embed.norm) is nn.Identity)
    return plain and not any(map(has_hooks, passed_over))


def embed_kept(
    model: TimmModule, images: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, grid: Grid
) -> Tensor:
    """Return prefix tokens and projected kept patches, with their positions: ``(total, dim)``.

    Args:
        model: a model for which :func:`embeds_kept_only` is true.
        images, indices, cu_seqlens, total, grid: arguments of :meth:`base.Family.embed`.
    """
    projection = model.patch_embed.proj
    prefix, pos_embed = _prefix_and_positions(model, grid)
    images, weight, bias, prefix, pos_embed = autocast(images, projection.weight, projection.bias, prefix, pos_embed)
    tokens = ops.embed_tokens(images, weight, bias, prefix, pos_embed, indices, cu_seqlens, total)
    return tokens.to(projection.weight.dtype)


def gather_kept(tokens: Tensor, num_prefix_tokens: int, indices: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the kept rows ``(total, dim)`` of tokens ``(segments, num_prefix_tokens + patches, dim)``."""
    prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
    return ops.gather_tokens(patches, prefix, indices, cu_seqlens, total)


def autocast(*tensors: Tensor | None) -> Any:
    """Cast tensors as autocast would for a convolution. autocast does not act on a registered operator itself."""
    device_type = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _prefix_and_positions(model: TimmModule, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Return prefix tokens with positions ``(num_prefix_tokens, dim)``, and positions of patches ``(patches, dim)``.

    The second is None if the model has no position embedding.
    """
    tokens = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    rows = [token[0] for token in tokens if token is not None]
    prefix = torch.cat(rows) if rows else model.patch_embed.proj.weight.new_empty(0, model.embed_dim)
    if model.pos_embed is None:
        return prefix, None
    own = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    pos_embed = resampled_positions(model.pos_embed, tuple(model.patch_embed.grid_size), grid, own)
    return (prefix + pos_embed[0, :own] if own else prefix), pos_embed[0, own:]
