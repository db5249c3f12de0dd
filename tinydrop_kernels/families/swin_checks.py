"""Checks that refuse a Swin Transformer whose packed forward would not do what timm's forward does.

They run when a model is patched, and again when something in a patched model has changed.
"""

from itertools import chain
from operator import attrgetter
from typing import Any

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from tinydrop_kernels.families.checks import CONTAINERS, foreign_method, hooks_in_vain, random_in_eval
from tinydrop_kernels.families.swin_windows import cell_side, cut_of, is_whole, merges, stages_of
from tinydrop_kernels.ops.types import TimmModule

_STAGES = (swin_transformer.SwinTransformerStage, swin_transformer_v2.SwinTransformerV2Stage)
_BLOCKS = (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)
_ATTENTIONS = (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)
_ATTENTION_PARTS = {"qkv", "attn_drop", "proj", "proj_drop", "softmax", "cpb_mlp"}
# Children of an attention that the packed forward does not call, and the classes that timm gives them.
_PASSED_OVER = {"softmax": (nn.Softmax,), "attn_drop": (nn.Dropout,), "cpb_mlp": (nn.Sequential, type(None))}
# The modes of ops.segment_pool whose results each pool of timm averages or concatenates.
POOL_MODES = {"avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"], "catavgmax": ["mean", "max"]}


def unsupported_swin(model: TimmModule, methods: tuple[str, ...]) -> str | None:
    """Return a description of the first part that is not supported, or None if every part is supported.

    Args:
        model: a ``SwinTransformer`` or ``SwinTransformerV2``.
        methods: names of the model's methods that must be timm's own.
    """
    base = SwinTransformerV2 if isinstance(model, SwinTransformerV2) else SwinTransformer
    return (
        foreign_method(model, base, methods)
        or _foreign_part(model)
        or _padded(model)
        or _foreign_head(model)
        or hooks_in_vain(_not_called(model))
        or random_in_eval(model)
    )


def settings(model: TimmModule) -> tuple[Any, ...]:
    """Return the attribute values that the checks depend on (:meth:`base.Family.settings`).

    A method that is replaced on the instance adds a name to ``vars(model)``.
    """
    cuts = [_cut(block) for stage in model.layers for block in stage.blocks]
    return (
        model.dynamic_img_size,
        tuple(model.patch_embed.grid_size),
        model.head.global_pool.pool_type,
        tuple(vars(model)),
        cuts,
    )


_cut = attrgetter("input_resolution", "window_size", "shift_size")


def _foreign_part(model: TimmModule) -> str | None:
    """Return a description of the first unsupported layer, block or attention, or None if all are supported."""
    if model.dynamic_img_size:
        return "dynamic_img_size, which chooses the windows for each image size; supported are images of one size"
    if type(model.layers) not in CONTAINERS:
        return f"layers in a {type(model.layers).__name__}; supported are timm's own"
    for number, stage in enumerate(model.layers):
        if type(stage) in _STAGES and type(stage.blocks) not in CONTAINERS:
            return f"layers.{number}.blocks in a {type(stage.blocks).__name__}; supported are timm's own"
        if type(stage) not in _STAGES or not (merges(stage) or type(stage.downsample) is nn.Identity):
            kind = f"{type(stage).__name__} beginning with {type(getattr(stage, 'downsample', None)).__name__}"
            return f"layers.{number} of {kind}; supported are timm's own (layers.{number}.downsample)"
        for place, block in enumerate(stage.blocks):
            attention, where = block.attn, f"layers.{number}.blocks.{place}"
            if type(block) not in _BLOCKS or type(attention) not in _ATTENTIONS:
                found = f"{type(block).__name__} and {type(attention).__name__}"
                return f"blocks of {found}; supported are timm's own ({where}, {where}.attn)"
            if attention._modules.keys() - _ATTENTION_PARTS or vars(block).keys() & {"_attn", "_calc_window_shift"}:
                return "blocks or attentions with children that timm's do not have, or with other methods"
            for name, kinds in _PASSED_OVER.items():
                part = getattr(attention, name, None)
                if type(part) not in kinds:
                    return f"{where}.attn.{name} of type {type(part).__name__}, which the packed forward does not call"
    return None


def _not_called(model: TimmModule) -> dict[str, nn.Module]:
    """Return the modules that are not called, by name: containers, the pool, and parts of attention."""
    head = model.head
    called = [model.patch_embed, model.norm, head.drop, head.fc, head.flatten]
    called += [stage.downsample for stage in model.layers if merges(stage)]
    for block in (block for stage in model.layers for block in stage.blocks):
        attention = block.attn
        called += [block.norm1, block.norm2, block.mlp, block.drop_path1, block.drop_path2]
        called += [attention.qkv, attention.proj, attention.proj_drop]
    within = {model, *chain.from_iterable(module.modules() for module in called)}
    return {name: module for name, module in model.named_modules() if module not in within}


def _padded(model: TimmModule) -> str | None:
    """Return a description of the first grid that timm would pad, or None if it pads none.

    timm's padding takes part in attention, which packed tokens do not reproduce.
    """
    side, patches = cell_side(model), model.patch_embed.grid_size
    if any(n % side for n in patches):
        return f"{patches[0]} x {patches[1]} patches, which timm pads to merge; supported are multiples of {side}"
    rows, columns = patches[0] // side, patches[1] // side
    for number, (stage, side) in enumerate(stages_of(model)):
        resolution = (rows * side, columns * side)
        for block in stage.blocks:
            if tuple(block.input_resolution) != resolution:
                return f"blocks of a grid of {block.input_resolution}, where its patch embedding gives {resolution}"
            if not is_whole(cut_of(model, number, block, (rows, columns), side), (rows, columns), side):
                size = "{} x {}".format(*block.window_size)
                return f"a grid of {resolution[0]} x {resolution[1]} in windows of {size}, which timm pads"
    return None


def _foreign_head(model: TimmModule) -> str | None:
    head = model.head
    if type(head) is not ClassifierHead:
        return f"a head of type {type(head).__name__}; supported is timm's ClassifierHead"
    if type(head.global_pool) is not SelectAdaptivePool2d:
        return f"head.global_pool of type {type(head.global_pool).__name__}; supported is timm's SelectAdaptivePool2d"
    if head.global_pool.pool_type not in POOL_MODES:
        return f"global_pool={head.global_pool.pool_type!r}; supported are {', '.join(POOL_MODES)}"
    return None
