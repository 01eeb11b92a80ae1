from pathlib import Path

import pytest

from tools import models
from tools.atomic import staged
from tools.errors import PrepareError
from tools.models import Target, main, prepare, select


def target(outcome: Exception | None = None) -> Target:
    def build(folder: Path, work: Path) -> None:
        with staged(folder / "thing") as path:
            path.mkdir()
            (work / "scratch").touch()
            if outcome:
                raise outcome

    return Target("thing", "models", ("thing",), "none", build)


def test_names_select_targets_once_and_in_their_order() -> None:
    names = ["text:wiki", "minilm-l6-v2", "text:wiki"]
    assert [chosen.name for chosen in select(names)] == ["text:wiki", "minilm-l6-v2"]


def test_no_name_selects_all() -> None:
    assert {"smollm2-135m-instruct", "text:gcide"} < {chosen.name for chosen in select([])}


def test_an_unknown_name_is_an_error_that_lists_the_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PrepareError, match=r"no such target: wiki\n.*text:wiki"):
        select(["wiki"])
    assert main(["wiki"]) == 2
    assert "no such target" in capsys.readouterr().err


def test_prepare_makes_a_target_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(target(), tmp_path)
    prepare(target(RuntimeError()), tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == "thing: present"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["thing"]


def test_a_failed_target_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PrepareError):
        prepare(target(PrepareError("broken", "mend it")), tmp_path)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_rest_is_made_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = target(PrepareError("broken", "mend it"))
    monkeypatch.setattr(models, "select", lambda _: [broken, target()])
    assert main(["--root", str(tmp_path)]) == 1
    assert "error: thing: broken\n  next: mend it" in capsys.readouterr().err
    assert (tmp_path / "models/thing").is_dir()
