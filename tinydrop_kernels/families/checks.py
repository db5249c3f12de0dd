"""Checks that refuse a model whose packed forward would not do what timm's forward does.

They run when a model is patched, and again when something in a patched model has changed.

A packed forward calls the modules of a model one by one, but it skips some of them. A hook on a skipped module would
have no effect. So a skipped module must be timm's own and have no hooks. No module of an eval model may be random.
"""

from collections.abc import Iterable, Mapping

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import nn

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.torch_internals import global_hooks, has_hooks, is_own

_PATCH_DROPS = (nn.Identity, PatchDropout, PatchDropoutWithIndices)
CONTAINERS = (nn.Sequential, nn.ModuleList)
# Attributes that are nonzero if a module is random. The rates belong to dropout, PatchDropout and DropPath, aug_active
# to timm's rotary embeddings, which jitter their angles.
_RATES = ("p", "prob", "drop_prob", "aug_active")


def foreign_method(model: TimmModule, base: type, methods: tuple[str, ...]) -> str | None:
    """Return a description of the first method that is not timm's, or None if all are timm's.

    A method is timm's if the base class defines it, or if patching has set it on the instance.
    """
    for method in methods:
        own = vars(model).get(method)
        if getattr(type(model), method) is not getattr(base, method) or not (own is None or is_own(own)):
            return f"a {method} that is not timm's"
    return None


def foreign_block(model: TimmModule, block_types: tuple[type, ...], attentions: Mapping[type, set[str]]) -> str | None:
    """Return a description of the first unsupported block or attention, or None if all are supported.

    Args:
        model: a model with ``blocks``, each with an ``attn``.
        block_types: supported types of blocks.
        attentions: supported types of attention modules, with the names of the children that each may have.
    """
    if type(model.blocks) not in CONTAINERS:
        return f"blocks in a {type(model.blocks).__name__}; supported are {_names(CONTAINERS)}"
    for number, block in enumerate(model.blocks):
        if type(block) not in block_types or not _has_own_forward(block):
            kind, supported = type(block).__name__, _names(block_types)
            return f"blocks of type {kind}; supported are {supported} (found at blocks.{number})"
        known = attentions.get(type(block.attn))
        if known is None or not _has_own_forward(block.attn):
            kind, supported = type(block.attn).__name__, _names(attentions)
            return f"attention of type {kind}; supported is timm's own {supported} (found at blocks.{number}.attn)"
        unknown = {name for name, _ in block.attn.named_children()} - known
        if unknown:
            return f"attention with {', '.join(sorted(unknown))}, which this version does not support"
    return None


def passed_over(model: TimmModule) -> str | None:
    """Return a description of what the packed forward would skip, or None if it skips nothing that matters.

    What matters is a replaced or hooked module that the packed forward does not call, and active dropout.

    Args:
        model: a model with ``pos_drop`` and with ``blocks``, each with an ``attn``. A ``patch_drop`` is optional.
    """
    patch_drop = getattr(model, "patch_drop", None)
    if patch_drop is not None and type(patch_drop) not in _PATCH_DROPS:
        return f"a patch_drop of type {type(patch_drop).__name__}; supported is timm's PatchDropout"
    drops = {"pos_drop": model.pos_drop}
    drops |= {f"blocks.{number}.attn.attn_drop": block.attn.attn_drop for number, block in enumerate(model.blocks)}
    for name, drop in drops.items():
        if type(drop) not in (nn.Dropout, nn.Identity):
            return f"{name} of type {type(drop).__name__}, which the packed forward does not call"
    pool = getattr(model, "attn_pool", None)
    more = {"patch_drop": patch_drop, "blocks": model.blocks, "attn_pool": pool}
    shared = {"rel_pos_bias": getattr(model, "rel_pos_bias", None)}
    return hooks_in_vain(drops | more | shared) or random_in_eval(model)


def hooks_in_vain(modules: Mapping[str, nn.Module | None]) -> str | None:
    """Return a description of hooks that the packed forward would not run, or None if there are none.

    Args:
        modules: the modules that the packed forward does not call, by name.
    """
    if global_hooks():
        return "hooks on every module (register_module_forward_hook), but the packed forward does not call every module"
    hooked = [name for name, module in modules.items() if module is not None and has_hooks(module)]
    if not hooked:
        return None
    named = ", ".join(hooked[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    return f"hooks or a forward of its own on {named}, which the packed forward does not call"


def random_in_eval(model: nn.Module) -> str | None:
    """Return a description of the first module that is random in an eval model, or None if there is none.

    A model in train mode may be random. A module that is random per image in timm, such as DropPath, would be random
    per token here.
    """
    if model.training:
        return None
    for name, module in model.named_modules():
        if module.training and (_is_random(module) or _is_random(getattr(module, "attn_drop", None))):
            return f"{name} ({type(module).__name__}) random in train mode, though the model is in eval mode"
    return None


def hooks_on_packed_rows(model: nn.Module) -> list[str]:
    """Return the names of hooked modules whose input is packed rows instead of timm's ``(batch, tokens, dim)``.

    Args:
        model: a target. Its stem and its head get the same shapes as in timm.
    """
    within = ("blocks.", "layers.", "norm.", "norm_pre.")
    return [name for name, module in model.named_modules() if f"{name}.".startswith(within) and has_hooks(module)]


def _is_random(module: nn.Module | None) -> bool:
    return any(getattr(module, name, 0) for name in _RATES)


def _has_own_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is None or is_own(forward)


def _names(types: Iterable[type]) -> str:
    return " and ".join(t.__name__ for t in types)
