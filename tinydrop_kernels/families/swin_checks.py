"""What of a Swin Transformer is looked at before it is patched, and at every call."""

from timm.layers import ClassifierHead, SelectAdaptivePool2d
from timm.models import swin_transformer, swin_transformer_v2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from tinydrop_kernels.families.blocks import has_hooks
from tinydrop_kernels.families.checks import foreign_method
from tinydrop_kernels.families.windows import cell_side, cut_of, is_whole, merges, stages_of
from tinydrop_kernels.ops.types import TimmModule

_STAGES = (swin_transformer.SwinTransformerStage, swin_transformer_v2.SwinTransformerV2Stage)
_BLOCKS = (swin_transformer.SwinTransformerBlock, swin_transformer_v2.SwinTransformerV2Block)
_ATTENTIONS = (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)
_ATTENTION_PARTS = {"qkv", "attn_drop", "proj", "proj_drop", "softmax", "cpb_mlp"}
# What each pool averages or joins.
POOL_MODES = {"avg": ["mean"], "max": ["max"], "avgmax": ["mean", "max"], "catavgmax": ["mean", "max"]}


def unsupported_swin(model: TimmModule, methods: tuple[str, ...]) -> str | None:
    """What of the model is not supported, or None; looks at attributes alone.

    Args:
        model: a ``SwinTransformer`` or ``SwinTransformerV2``.
        methods: which must be the class's own.
    """
    base = SwinTransformerV2 if isinstance(model, SwinTransformerV2) else SwinTransformer
    return foreign_method(model, base, methods) or _foreign_part(model) or _padded(model) or _foreign_head(model)


def _foreign_part(model: TimmModule) -> str | None:
    """Which part is none that was read, or is passed over and not what timm made it, or None."""
    if model.dynamic_img_size:
        return "dynamic_img_size, which makes windows of any image; supported are images of one size"
    for stage in model.layers:
        if type(stage) not in _STAGES or not (merges(stage) or type(stage.downsample) is nn.Identity):
            return f"{type(stage).__name__} beginning with {type(stage.downsample).__name__}; supported are timm's own"
        for block in stage.blocks:
            attention = block.attn
            if type(block) not in _BLOCKS or type(attention) not in _ATTENTIONS:
                return f"blocks of {type(block).__name__} and {type(attention).__name__}; supported are timm's own"
            if attention._modules.keys() - _ATTENTION_PARTS or vars(block).keys() & {"_attn", "_calc_window_shift"}:
                return "blocks or attentions with more than timm's parts, or other methods"
            biased = getattr(attention, "cpb_mlp", ())
            passed = (block, attention, attention.softmax, attention.attn_drop, biased, *biased)
            if any(isinstance(module, nn.Module) and has_hooks(module) for module in passed):
                return "hooks on a block or an attention, whose modules are called one by one"
            dropouts = (attention.attn_drop, block.drop_path1, block.drop_path2)
            if not model.training and any(d.training and _rate(d) for d in dropouts):
                return "dropout in train mode, though the model is in eval mode"
    if any(map(has_hooks, (model.layers, *model.layers, *(stage.blocks for stage in model.layers)))):
        return "hooks on layers or blocks, whose modules are called one by one"
    return None


def _rate(dropout: TimmModule) -> float:
    rate: float = getattr(dropout, "p", 0.0) or getattr(dropout, "drop_prob", 0.0) or 0.0
    return rate


def _padded(model: TimmModule) -> str | None:
    """Where timm would pad a grid to whole windows, whose padding takes part in attention, or None."""
    side, patches = cell_side(model), model.patch_embed.grid_size
    if any(n % side for n in patches):
        return f"{patches[0]} x {patches[1]} patches, which timm pads to merge; supported are multiples of {side}"
    rows, columns = patches[0] // side, patches[1] // side
    for number, (stage, side) in enumerate(stages_of(model)):
        resolution = (rows * side, columns * side)
        for block in stage.blocks:
            if tuple(block.input_resolution) != resolution:
                return f"blocks of a grid of {block.input_resolution}; its patch embedding's is of {resolution}"
            if not is_whole(cut_of(model, number, block, (rows, columns), side), (rows, columns), side):
                size = "{} x {}".format(*block.window_size)
                return f"a grid of {resolution[0]} x {resolution[1]} in windows of {size}, which timm pads"
    return None


def _foreign_head(model: TimmModule) -> str | None:
    head = model.head
    if type(head) is not ClassifierHead:
        return f"a head of type {type(head).__name__}; supported is timm's ClassifierHead"
    if type(head.global_pool) is not SelectAdaptivePool2d or head.global_pool.pool_type not in POOL_MODES:
        return f"global_pool={head.global_pool.pool_type!r}; supported are {', '.join(POOL_MODES)}"
    if any(map(has_hooks, (head, head.global_pool, head.global_pool.pool))):
        return "hooks on head or its pool, whose modules are called one by one"
    return None
