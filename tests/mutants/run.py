"""Seed one fault after the other into a copy of the package, and see that the tests named beside it fail.

    python tests/mutants/run.py [PART OF A PATH ...]

Each fault of ``faults.py`` replaces one piece of code. A fault that no test notices is printed, and the exit status is
the number of such faults. The tests beside a fault are those that a reader would expect to notice it; ``make test`` and
``make test-all`` run all of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]


def is_noticed(fault: Fault, copy: Path) -> bool:
    """Return whether the tests fail with the fault in the copy; the copy is put back afterwards."""
    file = copy / "tinydrop_kernels" / fault.path
    sound = file.read_text(encoding="utf-8")
    if sound.count(fault.old) != 1:
        raise SystemExit(f"{fault.path}: {fault.old!r} occurs {sound.count(fault.old)} times, expected once")
    file.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        tests = [f"tests/{name}" for name in fault.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(sound, encoding="utf-8")
    if done.returncode not in (0, 1):  # neither passed nor failed: no tests, or an error of pytest's
        raise SystemExit(
            f"{fault.path}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 1


def main() -> int:
    """Run the faults whose path has one of the arguments in it, all by default."""
    wanted = [fault for fault in FAULTS if not sys.argv[1:] or any(part in fault.path for part in sys.argv[1:])]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "*_cache", "results", "out")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, fault in enumerate(wanted, 1):
            start = time.perf_counter()
            noticed = is_noticed(fault, copy)
            missed += not noticed
            verdict = "noticed" if noticed else "MISSED "
            seconds = time.perf_counter() - start
            print(f"{number:2d} {verdict} {seconds:4.0f} s  {fault.path}: {fault.old!r} -> {fault.new!r}", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} faults noticed")
    return missed


if __name__ == "__main__":
    sys.exit(main())
