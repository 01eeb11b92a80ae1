"""Cases that `make test-slow` runs, and `make test` does not."""

from typing import Any

import pytest


def slow(*values: Any) -> list[Any]:
    """Return parameters of a test, marked as slow: others show what these do."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
