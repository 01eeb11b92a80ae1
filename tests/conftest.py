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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # most checkpoints are bf16, so each slow test on a real model runs from such a one as well
    if "real_model" in metafunc.fixturenames and metafunc.definition.get_closest_marker("slow"):
        metafunc.parametrize("real_model", ("fp32", "bf16"), indirect=True, scope="session")


@pytest.fixture(scope="session", autouse=True)
def shared_captures(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Where the processes of a run find what one of them has captured."""
    # imports Triton, which looks at the variable above
    from tests import captured

    if hasattr(request.config, "workerinput"):
        # the folder above is that of the whole run
        captured.shared = tmp_path_factory.getbasetemp().parent / "captured"
        captured.shared.mkdir(exist_ok=True)


@pytest.fixture(autouse=True)
def own_plugins_forgotten():
    """Forget the passes, mixers, ... that a test registers when it ends."""
    from reroll.rewrite.pipeline.registry import Registry

    before = {id(registry): dict(registry.classes) for registry in Registry.known}
    yield
    for registry in Registry.known:
        known = before.get(id(registry), {})
        ours = {n: c for n, c in registry.classes.items() if c.__module__.startswith("reroll.")}
        registry.classes = {**ours, **known}


@pytest.fixture(scope="session")
def real_model(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Where a real model lies; skips the test with the command that makes it where it does not."""
    form = getattr(request, "param", "fp32")

    def find(name: str) -> Path:
        if form == "bf16":
            name = f"{name}-bf16"
        if not (MODELS / name).exists():
            pytest.skip(f"models/{name} is not there: make models NAMES={name.split('/')[0]}")
        return MODELS / name

    return find


@pytest.fixture(scope="module")
def captured_once():
    """A model is captured once in a run of tests: a directory, or an object of a configuration.

    For tests of what is done with a capture; those of capturing go without.
    """
    from reroll.rewrite.capture import export
    from tests.remembered import remembering

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_captured", remembering(export._captured))
        yield
