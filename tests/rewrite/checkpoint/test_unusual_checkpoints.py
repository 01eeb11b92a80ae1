"""Unusual checkpoint directories: right where transformers opens and runs them, else refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reroll
from reroll.errors import RerollError
from reroll.rewrite.capture.models import OpenModel, open_model
from tests.rewrite.checkpoint.unusual import BARE, CASES, RIGHT, base

IDS = torch.randint(3, 290, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("usual") / "model")


def originals(path: Path, bare: bool) -> Tensor | None:
    """The output of the model that transformers makes of a directory.

    None if it makes none, or fills what it does not find with random numbers.
    """
    cls = transformers.AutoModel if bare else transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager"}
    try:
        with warnings.catch_warnings(action="ignore"):
            model, info = cls.from_pretrained(
                path, output_loading_info=True, local_files_only=True, **options
            )
    # whatever a damaged directory makes it raise
    except Exception:
        return None
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    with torch.no_grad():
        return model.eval()(IDS)[0]  # type: ignore[no-any-return]


def ours(path: Path) -> Tensor:
    """The output of the same class with the tensors that reroll reads."""
    opened = open_model(str(path))
    assert isinstance(opened, OpenModel)
    state = {n: opened.source.load(n).to(t.dtype) for n, t in opened.model.state_dict().items()}
    opened.model.load_state_dict(state, assign=True)
    with torch.no_grad():
        return opened.model(IDS)[0]  # type: ignore[no-any-return]


@pytest.fixture
def changed(request: pytest.FixtureRequest, usual: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(usual, path)
    return CASES[request.param][0](path) or path


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [(name, wanted) for name, (_, wanted) in CASES.items()],
    indirect=["changed"],
    ids=list(CASES),
)
def test_right_or_refused(changed: Path, wanted: str) -> None:
    expected = originals(changed, wanted == BARE)
    if wanted in (RIGHT, BARE):
        assert expected is not None, "transformers does not open it"
        assert torch.equal(ours(changed).nan_to_num(), expected.nan_to_num())
        return
    # the exceptions are in the table below, with the reason
    with pytest.raises(RerollError) as told:
        ours(changed)
    assert expected is None or wanted in REFUSED
    assert wanted in str(told.value)
    assert told.value.where
    assert told.value.hint


# what transformers opens, and reroll refuses, with the reason
REFUSED = {
    "adapter_config.json": "transformers applies the adapter, and a capture has none",
    "F8_E4M3": "numbers of 8 bits without the scales that belong to them",
}


def test_settings_that_cannot_be_read_do_not_stop_a_capture(usual: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(usual, path)
    for name in ("generation_config.json", "tokenizer.json"):
        (path / name).write_text("{")
    module = reroll.capture(str(path)).to_module()
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(path)(IDS).logits
        assert torch.allclose(module(IDS).logits, expected, atol=1e-4)
