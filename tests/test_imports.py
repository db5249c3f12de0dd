"""Six rules on which modules may import which others."""

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
FACE = "tinydrop_kernels"  # the package's own __init__, which imports lazily and so may name all modules
GROUND = ("version", "torch_internals", "_C")  # modules that any other module may import
USERS = ("__main__", "cli", "visualize", "predict")


def modules() -> dict[str, Path]:
    """Return the files of all modules by name, without the package's own ``__init__``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def text_of(node: ast.expr) -> str:
    """Return a string, or the constant start of an f-string and ``*``. Return "" for any other node."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
        return f"{node.values[0].value}*"
    return ""


def imports_of(source: str, name: str, is_package: bool = False) -> set[str]:
    """Return the names of the package's modules that a module imports anywhere. A computed name ends in ``*``."""
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
    """Return the modules that match a name; the name itself if there are none."""
    return [name for name in MODULES if fnmatchcase(name, imported)] or [imported]


@functools.cache
def edges() -> list[tuple[str, str]]:
    return [
        (name, goal)
        for name, path in MODULES.items()
        for imported in imports_of(path.read_text(), name, path.name == "__init__.py")
        for goal in goals(imported)
        if goal != name  # a computed name may stand for the module that computes it
    ]


def within(name: str, *folders: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


def offenders(is_forbidden) -> list[str]:
    return [f"{importer} imports {goal or 'the face'}" for importer, goal in edges() if is_forbidden(importer, goal)]


def test_the_operators_import_operators_alone():
    assert not offenders(lambda importer, goal: within(importer, "ops") and not within(goal, "ops", *GROUND))


def test_kernels_are_imported_by_the_registry_and_by_kernels_alone():
    """Kernels are imported when one is launched, by the registry."""
    found = offenders(lambda importer, goal: within(goal, "ops.kernels") and not within(importer, "ops.kernels"))
    assert found and all(line.startswith("ops.registry ") for line in found)


def test_families_know_models_and_operators_alone():
    assert not offenders(
        lambda importer, goal: within(importer, "families") and not within(goal, "families", "ops", *GROUND)
    )


def test_nothing_below_knows_its_users():
    assert not offenders(lambda importer, goal: within(goal, *USERS) and not within(importer, *USERS))


def test_a_policy_is_arithmetic():
    """Policies import only the operators' types, but neither models nor checkpoints."""
    assert not offenders(
        lambda importer, goal: within(importer, "policy") and not within(goal, "policy", "ops", *GROUND)
    )


def test_nobody_imports_the_face():
    assert not offenders(lambda importer, goal: not goal)


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
    """Importing ``ops`` loads neither Triton nor a kernel of ours, though torch's own modules may load Triton."""
    program = f"""
import sys, torch.utils.flop_counter
if {hide}:
    sys.modules.update(dict.fromkeys({ABSENT}))
before = set(sys.modules)
import tinydrop_kernels.ops as ops
assert "torch._dynamo" in before or "torch._dynamo" not in sys.modules  # 2 s
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(loaded & set({ABSENT})), [name for name in sys.modules if "tinydrop_kernels.ops.kernels" in name])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[] []\n"), done.stderr


def shadowed(package) -> list[str]:
    """Return the submodules of a package whose name is another object in the package."""
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
