from __future__ import annotations

import pytest

from reroll.rewrite.pipeline import registry


@pytest.fixture
def passes(monkeypatch):
    """A function that registers passes until the test ends."""
    known = dict(registry.registered())
    monkeypatch.setattr(registry, "_passes", known)
    return lambda *classes: [registry.register(cls) for cls in classes]
