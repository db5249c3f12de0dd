"""Who may import whom: every import of the package points down."""

import ast
import functools
import importlib
import pkgutil
import subprocess
import sys
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tinydrop_kernels

ROOT = Path(tinydrop_kernels.__file__).parent
FACE = "tinydrop_kernels"  # the package's own __init__, which is lazy and may name everything
# The lowest first; a module belongs where it is found first, and may import what is in lower rooms.
ROOMS = (
    ("version", "compiling", "precision", "torch_internals", "ops.types", "ops.tracing", "_C"),
    ("ops.kernels", "ops.kernels.*"),
    ("ops.registry", "ops.saliency", "ops.cuda_extension"),
    ("ops.gather", "ops.attention_reference"),
    ("ops.select", "ops.packing", "ops.embed", "ops.pool", "ops.attention"),
    ("ops",),
    ("policy", "identity", "flops", "images", "rowfile", "graphs", "copying"),
    ("policyfile", "answers"),
    ("cam", "checkpoints", "onednn"),
    ("folding",),
    ("guidance",),
    ("families.base",),
    ("families.grids", "families.blocks"),
    ("families.checks", "families.embedding", "families.pools", "families.rotary", "families.windows"),
    ("families.costs", "families.swin_checks", "families.swin_costs"),
    ("families.*",),
    ("families",),
    ("buckets", "plan", "head"),
    ("report", "target", "features", "callcheck"),
    ("timing",),
    ("engine",),
    ("patching", "prediction", "pipeline"),
    ("predictor", "visualize"),
    ("calibration.table", "calibration.bounds"),
    ("calibration.sweep", "calibration.collection"),
    ("calibration.sequence", "calibration.frontier"),
    ("calibration",),
    ("page",),
    ("gallery",),
    ("options",),
    ("calibrating",),
    ("cli",),
    ("__main__",),
)
NEIGHBOURS = ("ops.kernels.",)  # these may import one another, without a circle


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it; the face is left out."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def room_of(name: str) -> int:
    for number, patterns in enumerate(ROOMS):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return number
    raise AssertionError(f"{name}: in none of the rooms, see {__file__}")


def text_of(node: ast.expr) -> str:
    """A string, or as much of an f-string as is constant; "" if it is anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
        return f"{node.values[0].value}*"
    return ""


def imports_of(source: str, name: str, is_package: bool = False) -> set[str]:
    """What a module imports of the package, anywhere in it: names of modules, ending in * where they are computed."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = f"{FACE}.{name}".split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner.removeprefix(f"{FACE}.") in MODULES else base)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if called in ("import_module", "__import__"):
                found.add(text_of(node.args[0]))
    return {module.removeprefix(FACE).lstrip(".") for module in found if module.split(".")[0] == FACE}


def goals(imported: str) -> list[str]:
    """The modules that a name stands for; itself, if there are none."""
    return [name for name in MODULES if fnmatchcase(name, imported)] or [imported]


@functools.cache
def edges() -> list[tuple[str, str]]:
    return [
        (name, goal)
        for name, path in MODULES.items()
        for imported in imports_of(path.read_text(), name, path.name == "__init__.py")
        for goal in goals(imported)
    ]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_room(name):
    room_of(name)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    for importer, goal in edges():
        if importer != name or (all(one.startswith(NEIGHBOURS) for one in (name, goal)) and name != goal):
            continue
        assert goal, f"{name} imports from the face of the package"
        assert room_of(goal) < room_of(name), f"{name} imports {goal}, which is not below it"


def test_there_is_no_circle():
    graph = {name: {goal for importer, goal in edges() if importer == name} for name in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tinydrop_kernels.ops.types", {"ops.types"}),
        ("from tinydrop_kernels import ops, patch", {"ops", ""}),
        ("from tinydrop_kernels.ops import types, Law", {"ops.types", "ops"}),
        ("def f():\n    from tinydrop_kernels.engine import TinyDrop", {"engine"}),
        ("from .types import Law", {"ops.types"}),
        ("from ..engine import TinyDrop", {"engine"}),
        ("import importlib\nimportlib.import_module('tinydrop_kernels.engine')", {"engine"}),
        ("import_module(f'tinydrop_kernels.ops.kernels.{name}')", {"ops.kernels.*"}),
        ("import torch, tinydrop_kernels_of_another", set()),
    ],
)
def test_imports_are_found(source, found):
    assert imports_of(source, "ops.select") == found


ABSENT = ("timm", "torchvision", "triton", "click", "PIL", "tqdm")


@pytest.mark.parametrize("hide", [False, True], ids=["beside the others", "alone"])
def test_the_operators_need_torch_alone(hide):
    """Torch's own modules may load Triton; ours do not, nor a kernel, before one is launched."""
    program = f"""
import sys, torch.utils.flop_counter
if {hide}:
    sys.modules.update(dict.fromkeys({ABSENT}))
before = set(sys.modules)
import tinydrop_kernels.ops as ops
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(loaded & set({ABSENT})), [name for name in sys.modules if "tinydrop_kernels.ops.kernels" in name])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def shadowed(package) -> list[str]:
    """Submodules of a package whose name means something else there."""
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    own = [name for name in names if name != "__main__" and not name.startswith("_C")]
    imported = {name: importlib.import_module(f"{package.__name__}.{name}") for name in own}
    return [name for name, module in imported.items() if getattr(package, name) is not module]


def test_no_module_of_the_operators_is_shadowed():
    import tinydrop_kernels.ops as package

    pytest.importorskip("triton")
    assert shadowed(package) == [] and shadowed(package.kernels) == []


def test_no_module_of_the_package_is_shadowed():
    pytest.importorskip("timm")
    pytest.importorskip("click")
    assert shadowed(tinydrop_kernels) == [] and shadowed(tinydrop_kernels.families) == []
