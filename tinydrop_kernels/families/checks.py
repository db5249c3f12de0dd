"""What is refused of a model when it is patched, and again when something in it has changed since then.

A packed forward calls the modules of a model one by one. Some of timm's are not called at all, and what hangs on those
would have no effect. So they must be timm's own, without hooks, and nothing may be random in an eval model.
"""

from collections.abc import Iterable, Mapping

from timm.layers import PatchDropout, PatchDropoutWithIndices
from torch import nn

from tinydrop_kernels.ops.types import TimmModule
from tinydrop_kernels.torch_internals import global_hooks, has_hooks, is_own

_PATCH_DROPS = (nn.Identity, PatchDropout, PatchDropoutWithIndices)
CONTAINERS = (nn.Sequential, nn.ModuleList)
# Of dropout, PatchDropout and DropPath; and of timm's rotary embeddings, where they are jittered.
_RATES = ("p", "prob", "drop_prob", "aug_active")


def foreign_method(model: TimmModule, base: type, methods: tuple[str, ...]) -> str | None:
    """Describe the first of the methods that is neither the base class's own nor set by patching; None if all are."""
    for method in methods:
        own = vars(model).get(method)
        if getattr(type(model), method) is not getattr(base, method) or not (own is None or is_own(own)):
            return f"a {method} that is not timm's"
    return None


def foreign_block(model: TimmModule, block_types: tuple[type, ...], attentions: Mapping[type, set[str]]) -> str | None:
    """Describe the first block or attention that this package does not know; None if it knows all.

    Args:
        model: with ``blocks`` that have an ``attn`` each.
        block_types: types of blocks that are known.
        attentions: types of attentions that are known, and names of the modules that each may have.
    """
    if type(model.blocks) not in CONTAINERS:
        return f"blocks in a {type(model.blocks).__name__}; supported are {_names(CONTAINERS)}"
    for number, block in enumerate(model.blocks):
        if type(block) not in block_types or not _has_own_forward(block):
            kind, supported = type(block).__name__, _names(block_types)
            return f"blocks of type {kind}; supported are {supported} (blocks.{number} is none)"
        known = attentions.get(type(block.attn))
        if known is None or not _has_own_forward(block.attn):
            kind, supported = type(block.attn).__name__, _names(attentions)
            return f"attention of type {kind}; supported is timm's own {supported} (blocks.{number}.attn is none)"
        unknown = {name for name, _ in block.attn.named_children()} - known
        if unknown:
            return f"attention with {', '.join(sorted(unknown))}, which this version does not know"
    return None


def passed_over(model: TimmModule) -> str | None:
    """Describe what timm's forward runs and the packed one does not: a module replaced or hooked, or active dropout.

    Args:
        model: of a family with ``blocks`` that have an ``attn`` each, ``pos_drop`` and maybe a ``patch_drop``.
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
    """Describe the hooks on modules that the packed forward does not call, or on every module; None if there are none.

    Args:
        modules: those that are not called, by name.
    """
    if global_hooks():
        return "hooks on every module (register_module_forward_hook), some of which the packed forward does not call"
    hooked = [name for name, module in modules.items() if module is not None and has_hooks(module)]
    if not hooked:
        return None
    named = ", ".join(hooked[:3]) + (f" and {len(hooked) - 3} more" if len(hooked) > 3 else "")
    return f"hooks or a forward of its own on {named}, which the packed forward does not call"


def random_in_eval(model: nn.Module) -> str | None:
    """Describe the first module that is random though the model is in eval mode; None if there is none.

    What is random for images in timm, as DropPath is, would be random for single tokens here.
    """
    if model.training:
        return None
    for name, module in model.named_modules():
        if module.training and (_is_random(module) or _is_random(getattr(module, "attn_drop", None))):
            return f"{name} ({type(module).__name__}) random in train mode, though the model is in eval mode"
    return None


def hooks_on_packed_rows(model: nn.Module) -> list[str]:
    """Return the names of hooked modules that are handed packed rows, where timm hands ``(batch, tokens, dim)``.

    Args:
        model: a target; its stem and its head see what they see in timm.
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
