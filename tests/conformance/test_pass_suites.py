from __future__ import annotations

import importlib

import pytest

from reroll.rewrite.pipeline.base import PASSES
from reroll.rewrite.pipeline.pipeline import resolve
from tests.conformance.pass_suite import PassSuite

OWN = [name for name, cls in PASSES.all().items() if cls.__module__.startswith("reroll.passes.")]


@pytest.mark.parametrize("name", OWN)
def test_every_pass_goes_through_the_suite(name):
    module = importlib.import_module(f"tests.passes.test_{name}")
    suites = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, PassSuite) and value is not PassSuite
    ]
    assert name in {resolve(suite.pipeline)[-1].name for suite in suites}


@pytest.mark.parametrize("name", OWN)
def test_a_pass_is_in_a_file_of_its_name(name):
    assert PASSES.all()[name].__module__.rpartition(".")[2] == name
