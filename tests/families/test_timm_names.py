"""docs/models.md against the timm that is installed, name by name."""

import gc
import os
import re
from pathlib import Path

import pytest
import timm
from timm_names import SUPPORTED, names, outcome
from torch.utils._device import _device_constructors

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
REFUSED = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
LISTED = set(re.findall(r"`([a-z]\w+)`", PAGE))


@pytest.fixture(autouse=True)
def poison_empty():
    """None: ``torch.device("meta")`` knows a replaced ``torch.empty`` not, and 7B weights would be real.

    What it knows is found out once, perhaps in a test where it was replaced.
    """
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    """Patched models are cycles, and these are large for their number of objects."""
    yield
    gc.collect()


def test_the_page_is_of_this_timm():
    missing, gone = set(timm.list_models()) - LISTED, LISTED - set(timm.list_models())
    assert f"timm {timm.__version__} knows" in PAGE.replace("\n", " "), "run make models, and look at what it says"
    assert not missing and not gone


# All of them take minutes, and most differ in size alone: a few of each file, unless all are asked for; no large
# hybrids, whose stems are built in full size.
FEW = {*names()[::6], *REFUSED} - {name for name in names() if name.startswith("vitamin_large")}
TRIED = names() if os.environ.get("TINYDROP_ALL_NAMES") else sorted(FEW)


@pytest.mark.parametrize("name", TRIED)
def test_supported_or_refused_as_the_page_says(name):
    found = outcome(name).partition("; supported")[0]
    assert found == REFUSED.get(name, SUPPORTED), "run make models, and look at what it says"
