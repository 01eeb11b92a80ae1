from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton looks at this when it is imported first, by whatever test that is
os.environ.setdefault("TRITON_INTERPRET", "1")

MODELS = Path(__file__).parents[1] / "models"


def pytest_configure() -> None:
    # the tests of a run share few cores, and small tensors gain nothing from several
    torch.set_num_threads(1)
    # how long an example takes says more about the machine than about the code
    settings.register_profile("reroll", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("reroll")


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Where a real model lies; skips the test with the command that makes it where it does not."""

    def find(name: str) -> Path:
        if not (MODELS / name).exists():
            pytest.skip(f"models/{name} is not there: make models NAMES={name.split('/')[0]}")
        return MODELS / name

    return find
