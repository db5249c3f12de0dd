"""What is looked at before a model is patched, and at every call: is it still timm's, is nothing passed over?"""

from collections.abc import Callable, Iterable

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from tinydrop_kernels.families.blocks import has_hooks, is_attend
from tinydrop_kernels.ops.types import TimmModule


def foreign_method(model: TimmModule, base: type, methods: tuple[str, ...]) -> str | None:
    """Which of the methods is not the base class's own, or None."""
    for method in methods:
        if getattr(type(model), method) is not getattr(base, method) or method in vars(model):
            return f"its {method} is not timm's"
    return None


def foreign_block(model: TimmModule, block_types: tuple[type, ...], attentions: dict[type, set[str]]) -> str | None:
    """Which block or attention is none that was read, or None.

    Args:
        model: whose ``blocks`` have an ``attn`` each.
        block_types: what a block may be.
        attentions: what an attention may be, and the names of the modules that it may have.
    """
    for block in model.blocks:
        if type(block) not in block_types:
            return f"blocks of type {type(block).__name__}; supported are {_names(block_types)}"
        known = attentions.get(type(block.attn))
        if known is None or "forward" in vars(block.attn):
            return f"attention of type {type(block.attn).__name__}; supported is timm's own {_names(attentions)}"
        unknown = {name for name, _ in block.attn.named_children()} - known
        if unknown:
            return f"attention with {', '.join(sorted(unknown))}, which this version does not know"
    return None


def replaced(model: TimmModule, methods: tuple[str, ...], attend: Callable[..., Tensor]) -> str | None:
    """Which of a patched model's methods or attentions somebody replaced, or None."""
    own = vars(model).keys() & set(methods)
    if own:
        return f"its {min(own)} was replaced"
    if not all(is_attend(vars(block.attn).get("forward"), attend) for block in model.blocks):
        return "an attention was replaced"
    return None


def passed_over(model: TimmModule) -> str | None:
    """What timm would run and the packed forward does not: hooks on containers, a patch_drop, active dropout."""
    patch_drop = getattr(model, "patch_drop", None) or nn.Identity()
    if type(patch_drop) not in (nn.Identity, PatchDropout, PatchDropoutWithIndices) or has_hooks(patch_drop):
        return f"a patch_drop of type {type(patch_drop).__name__}, or with hooks; supported is timm's PatchDropout"
    if has_hooks(model.blocks):
        return "hooks on blocks, whose modules are called one by one"
    if not model.training:
        dropouts = [model.pos_drop, patch_drop, *(block.attn.attn_drop for block in model.blocks)]
        if any(d.training and (getattr(d, "p", 0) or getattr(d, "prob", 0)) for d in dropouts):
            return "dropout in train mode, though the model is in eval mode"
    return None


def _names(types: Iterable[type]) -> str:
    return " and ".join(t.__name__ for t in types)
