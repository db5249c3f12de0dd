"""The date and the library versions of a calibration."""

from datetime import datetime, timezone

import timm
import torch


def versions() -> dict[str, str]:
    """Return the versions of the libraries that can change the models' outputs."""
    return {"timm": timm.__version__, "torch": str(torch.__version__)}


def today() -> str:
    """Return today's date in UTC, as ``YYYY-MM-DD``."""
    return datetime.now(timezone.utc).date().isoformat()
