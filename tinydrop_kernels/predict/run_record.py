"""The record of a run beside its rows: models, policy, versions, command lines and costs, as JSON (docs/rows.md)."""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

from tinydrop_kernels.policy.calibrated import plain_values
from tinydrop_kernels.policy.fingerprint import fingerprint_of
from tinydrop_kernels.predict.predictor import Predictor
from tinydrop_kernels.predict.row_file import RowFileError, RowOutput
from tinydrop_kernels.predict.whole_file import replacing
from tinydrop_kernels.version import __version__

SCHEMA = 1  # version of the rows and of this record
SAME = ("schema", "target", "guidance", "policy", "top")  # what all runs of a file share


def versions() -> dict[str, str | None]:
    """Return the versions of this package, torch, timm and Triton; None for one that is not installed."""
    found: dict[str, str | None] = {"tinydrop_kernels": __version__}
    for package in ("torch", "timm", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


class RunRecord:
    """The file ``rows.jsonl.run.json`` for ``rows.jsonl``. It is written when the run begins and when it ends.

    Args:
        out: the file of rows.
        rows: its rows. If there are some already, the record must be of the same models, policy and ``top``.
        predictor: the predictor of this run.
        command: the command line, word by word.

    Raises:
        RowFileError: the rows that are there come from other models or another policy, or the record cannot be read or
            written.
    """

    def __init__(self, out: Path, rows: RowOutput, predictor: Predictor, command: list[str]):
        self.path = out.with_name(f"{out.name}.run.json")
        self._rows, self._predictor = rows, predictor
        earlier = self._read() if rows.done and self.path.exists() else {}
        about = json.loads(json.dumps(_about(predictor)))  # tuples become lists, as in the file
        for name in SAME if earlier else ():
            if earlier.get(name) != about[name]:
                raise RowFileError(
                    f"resume: the rows in {str(out)!r} are of another {name}: got {json.dumps(about[name])}, expected "
                    f"{json.dumps(earlier.get(name))}"
                )
        self._run: dict[str, Any] = {"command": command, "versions": versions(), "ended": None}
        self._values = about | {"runs": [*earlier.get("runs", []), self._run]}
        self._write()

    def end(self, ended: str) -> None:
        """Add how the run ended, and its costs.

        Args:
            ended: "complete", "interrupted" or "failed".

        Raises:
            RowFileError: the record cannot be written.
        """
        self._run |= {"ended": ended, "rows": self._rows.written} | _costs(self._predictor)
        self._write()

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
        except (OSError, ValueError):
            pass
        raise RowFileError(f"resume: {str(self.path)!r} is not the record of a run; remove it to go on without it")

    def _write(self) -> None:
        try:
            with replacing(self.path) as part:
                part.write_text(f"{json.dumps(self._values, indent=2, allow_nan=False)}\n", encoding="utf-8")
        except OSError as error:
            raise RowFileError(f"out: {str(self.path)!r} cannot be written: {error.strerror or error}") from None


def _about(predictor: Predictor) -> dict[str, Any]:
    """Return what decides the rows of an image: the models, their input sizes, the policy and the number of classes."""
    model, tinydrop = predictor.model, predictor.model.tinydrop
    target = fingerprint_of(model, tinydrop.num_classes)._asdict() | {"input_size": model.patch_embed.img_size}
    guidance = tinydrop.guidance.fingerprint._asdict() | {"input_size": tinydrop.guidance.input_size}
    policy = plain_values(tinydrop.policy)
    return {"schema": SCHEMA, "target": target, "guidance": guidance, "policy": policy, "top": predictor.top}


def _costs(predictor: Predictor) -> dict[str, Any]:
    report = predictor.report
    costs: dict[str, Any] = {"images": 0, "unreadable": len(predictor.unreadable)}
    if report is None or report.wall_seconds is None:
        return costs
    return costs | {
        "images": report.images,
        "exits": report.exits,
        "mean_keep": None if math.isnan(report.mean_keep) else report.mean_keep,
        "flops_saved": report.flops_saved,
        "images_per_second": report.images / report.wall_seconds,
    }
