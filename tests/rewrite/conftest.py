from __future__ import annotations

import pytest

from reroll.rewrite.pipeline.base import PASSES


@pytest.fixture
def passes(monkeypatch):
    """A function that registers passes until the test ends."""
    monkeypatch.setattr(PASSES, "classes", PASSES.all())
    return lambda *classes: [PASSES.add(cls) for cls in classes]
