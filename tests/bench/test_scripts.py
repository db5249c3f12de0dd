"""Tests that every script of bench, demo and examples can be imported without side effects."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(file for folder in ("bench", "demo", "examples") for file in (ROOT / folder).glob("*.py"))
# All scripts are imported in one process, because starting one takes seconds. The process is not that of the tests,
# because some scripts decide how Triton runs.
PROGRAM = """
import argparse, importlib, json, sys, traceback
from pathlib import Path
import torch

def work(*_, **__):
    raise AssertionError("a script runs a model or reads arguments when it is imported")

argparse.ArgumentParser.parse_args = torch.nn.Module.__call__ = work
found = {}
for path in map(Path, sys.argv[1:]):
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
        assert Path(module.__file__) == path, f"it is shadowed by {module.__file__}"
    except ModuleNotFoundError as error:
        found[str(path)] = f"needs {error.name.partition('.')[0]}"
    except Exception:
        found[str(path)] = traceback.format_exc()
    sys.path.pop(0)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def errors():
    """Return the import errors by the scripts' paths."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", PROGRAM, *SCRIPTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1, f"a script prints when it is imported: {done.stdout[-1000:]}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_can_be_imported(errors, script):
    error = errors.get(str(script), "")
    needed = error.removeprefix("needs ")
    if needed != error and needed not in {"tinydrop_kernels", *(other.stem for other in SCRIPTS)}:
        pytest.skip(error)
    assert not error, error
