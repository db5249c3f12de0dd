"""A trial of every model name that timm knows. ``make models`` writes the result to docs/models.md.

Each model is built small, with random weights. It is supported if the patched model gives timm's logits twice: with all
patches kept, and with every image at a coarser grid. Otherwise it must be refused, and the table gives the message.
"""

import copy
import sys
import textwrap
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
from helpers import tiny_guidance, with_random_weights
from timm.layers import PatchEmbed
from timm.models import Beit, Eva, SwinTransformer, SwinTransformerV2, VisionTransformer, model_entrypoint

import tinydrop_kernels as tdk
from tinydrop_kernels.families import family_of

ROOTS = (VisionTransformer, Beit, Eva, SwinTransformer, SwinTransformerV2)
SUPPORTED = ""
# Options to try in turn until timm can build the model, because not every model accepts every option.
SMALL: list[dict[str, Any]] = [
    {"embed_dim": 32, "num_heads": 2, "depth": 2},
    {"embed_dim": 128, "num_heads": 8, "depth": 2},
    {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "depth": 2},
    {"depth": 2},
    {"embed_dim": 16, "num_heads": (1, 2, 2, 4), "depths": (1, 1, 2, 1)},
    {"embed_dim": (64, 128, 384), "num_heads": 6, "depth": 2},
    {},
]


def may_be_ours(name: str) -> bool:
    """Return whether the timm module that builds the model mentions a class of a supported family."""
    known = vars(sys.modules[model_entrypoint(name).__module__]).values()
    return any(isinstance(value, type) and issubclass(value, ROOTS) for value in known)


def names() -> list[str]:
    """Return the names whose models may belong to a supported family."""
    return [name for name in timm.list_models() if may_be_ours(name)]


def build(name: str) -> torch.nn.Module:
    """Return a small version of the model with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        stock = timm.create_model(name)
    patch_embed = getattr(stock, "patch_embed", None)
    options: dict[str, Any] = {"num_classes": 5}
    if hasattr(stock, "blocks") and type(patch_embed) is PatchEmbed:
        options["img_size"] = tuple(6 * side for side in patch_embed.patch_size)
    for small in SMALL:
        try:
            with torch.device("meta"):
                shape = timm.create_model(name, **options, **small)
            if sum(p.numel() for p in shape.parameters()) < 100e6:
                return with_random_weights(timm.create_model(name, **options, **small))
        except (TypeError, AssertionError, RuntimeError, ValueError, IndexError):
            continue
    raise AssertionError(f"{name}: none of the small forms of {__file__} can be built")


def outcome(name: str) -> str:
    """Return :data:`SUPPORTED`, or the error message if the model is refused.

    Raises:
        AssertionError: The patched model gives other logits than timm.
    """
    try:
        model = build(name)
        family = family_of(model)
        images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*keeps its dense grid")
            wanted = model(images)
            untouched = copy.deepcopy(model)
            tdk.patch(model, tiny_guidance(in_chans=model.in_chans), tdk.DropPolicy.fixed(1.0))
            assert_close(model(images), wanted)
            model.tinydrop.policy = tdk.DropPolicy.fixed(0.5, coarsen=1.0)
            out = model(images)
            grid, patch = model.tinydrop.last.grid_sizes[0], family.patch_size(model)
            if len(model.tinydrop.levels(family.grid_size(model, images))) > 1:
                size = (grid[0] * patch[0], grid[1] * patch[1])
                untouched.set_input_size(img_size=size)
                rows, columns = model.tinydrop.levels(family.grid_size(model, images))[0]
                whole = images[..., : rows * patch[0], : columns * patch[1]]
                resized = torch.nn.functional.interpolate(whole, size=size, mode="bicubic", antialias=True)
                wanted = untouched(resized)
            assert_close(out, wanted)
    except tdk.UnsupportedModelError as refusal:
        return str(refusal)
    return SUPPORTED


def assert_close(out: torch.Tensor, wanted: torch.Tensor) -> None:
    assert out.shape == wanted.shape
    assert (out - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def document(outcomes: dict[str, str]) -> str:
    """Return docs/models.md, the table of all names as Markdown."""
    supported: dict[str, list[str]] = defaultdict(list)
    for name, message in outcomes.items():
        if message == SUPPORTED:
            supported[model_entrypoint(name).__module__.rsplit(".", 1)[-1]].append(name)
    refused = {name: message for name, message in outcomes.items() if message != SUPPORTED}
    others: dict[str, list[str]] = defaultdict(list)
    for name in timm.list_models():
        if name not in outcomes:
            others[model_entrypoint(name).__module__.rsplit(".", 1)[-1]].append(name)
    lines = [
        "# timm's models",
        "",
        *textwrap.wrap(
            f"Every name that timm {timm.__version__} knows, tried by `make models`: built small, with random weights, "
            "patched, and compared with timm's own answer, once with everything kept and once with every image at a "
            "coarser grid. A test compares this page with the installed timm: the names, and of each file a few "
            "models, or with TINYDROP_ALL_NAMES=1 all.",
            118,
        ),
        "",
        f"Of {len(timm.list_models())} names {sum(map(len, supported.values()))} are supported, {len(refused)} of the",
        f"same files are refused, and {sum(map(len, others.values()))} are other architectures.",
    ]
    for module, own in sorted(supported.items()):
        lines += ["", f"## Supported: {module} ({len(own)})", "", *_wrapped(own)]
    lines += ["", "## Refused, with this message", "", "| name | message |", "|---|---|"]
    lines += [f"| `{name}` | {message.partition('; supported')[0]} |" for name, message in refused.items()]
    lines += ["", "## Other architectures", "", "Refused by their class.", ""]
    for module, own in sorted(others.items()):
        lines += [*_wrapped(own, f"* {module} ({len(own)}): ")]
    return "\n".join(lines) + "\n"


def _wrapped(own: list[str], start: str = "") -> list[str]:
    listed = start + ", ".join(f"`{name}`" for name in own)
    return textwrap.wrap(
        listed, 118, subsequent_indent="  " * bool(start), break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    found = {}
    for each in names():
        found[each] = outcome(each)
        print(each, found[each] or "supported", flush=True)
    Path(sys.argv[1]).write_text(document(found))
