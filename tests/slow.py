"""Parameters of tests that are mostly left to ``make test-slow``. Needs pytest alone."""

import pytest


def mostly_slow(values, *quick):
    """Return test parameters. All except the quick ones are marked slow, so ``make test`` leaves them out."""
    slow = pytest.mark.slow
    parameters = [(value, value if isinstance(value, tuple) else (value,)) for value in values]
    return [value if value in quick else pytest.param(*unpacked, marks=slow) for value, unpacked in parameters]
