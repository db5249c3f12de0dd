"""When and with which libraries a policy was calibrated."""

from datetime import datetime, timezone

import timm
import torch


def versions() -> dict[str, str]:
    """Of what bears on the answers."""
    return {"timm": timm.__version__, "torch": str(torch.__version__)}


def today() -> str:
    """The date, in UTC."""
    return datetime.now(timezone.utc).date().isoformat()
