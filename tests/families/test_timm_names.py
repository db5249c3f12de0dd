"""A comparison of docs/models.md with the installed timm, model name by model name."""

import gc
import os
import re
from pathlib import Path

import pytest
import timm
from timm_names import SUPPORTED, names, outcome
from torch.utils._device import _device_constructors

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
REFUSED = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M))
LISTED = set(re.findall(r"`([a-z]\w+)`", PAGE))


@pytest.fixture(autouse=True)
def poison_empty():
    """Disable the fixture of the same name, so that models of 7B parameters are built on the meta device.

    ``torch.device("meta")`` does not act on a replaced ``torch.empty``. torch caches the list of functions that it acts
    on, perhaps during a test where ``torch.empty`` was replaced, so the cache is cleared.
    """
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    """Collect garbage after each test, because patched models are reference cycles and these are large."""
    yield
    gc.collect()


def test_the_page_is_of_this_timm():
    missing, gone = set(timm.list_models()) - LISTED, LISTED - set(timm.list_models())
    assert f"timm {timm.__version__} knows" in PAGE.replace("\n", " "), "run make models, and look at what it says"
    assert not missing and not gone


# All names take minutes and most differ only in size, so they are tried only with TINYDROP_ALL_NAMES=1. Otherwise every
# sixth name is tried, and every name that the page lists as refused. Large vitamin models are left out, because their
# stems cannot be made small.
FEW = {*names()[::6], *REFUSED} - {name for name in names() if name.startswith("vitamin_large")}
TRIED = names() if os.environ.get("TINYDROP_ALL_NAMES") else sorted(FEW)


@pytest.mark.parametrize("name", TRIED)
def test_supported_or_refused_as_the_page_says(name):
    found = outcome(name).partition("; supported")[0]
    assert found == REFUSED.get(name, SUPPORTED), "run make models, and look at what it says"
