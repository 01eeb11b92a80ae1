"""What holds for every export target: inherit `TargetSuite` and name the target.

class TestOnnx(TargetSuite):
    target = "onnx"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from reroll.errors import UsageError
from reroll.export.targets import Target, find
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.compare import fingerprint
from tests.captured import captured


class TargetSuite:
    """Tests of one target."""

    target: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = ("llama", "bert")

    @pytest.fixture
    def under_test(self) -> type[Target]:
        return find(self.target)

    @pytest.fixture(params=range(2))
    def program(self, request: pytest.FixtureRequest) -> Program:
        return captured(self.models[request.param % len(self.models)])

    def test_it_documents_itself(self, under_test: type[Target]) -> None:
        described = under_test.describe()
        json.dumps(described)
        assert described["documentation"].partition("\n")[0].endswith(".")
        for item in described["options"]:
            assert item["help"], f"{item['name']} has no help"

    def test_options_that_are_wrong(self, under_test: type[Target]) -> None:
        for words in (["--no-such-option", "1"], ["word"]):
            with pytest.raises(UsageError):
                under_test.parse(words)

    def test_it_leaves_the_program_alone(
        self, under_test: type[Target], program: Program, tmp_path: Path
    ) -> None:
        kept = fingerprint(program), str(program)
        found = under_test.make({}).write(program, tmp_path)
        assert (fingerprint(program), str(program)) == kept
        json.dumps(found)
        assert any(tmp_path.iterdir())

    def test_it_repeats(self, under_test: type[Target], program: Program, tmp_path: Path) -> None:
        written = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            under_test.make({}).write(program, tmp_path / name)
            files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
            written.append({p.relative_to(tmp_path / name): p.read_bytes() for p in files})
        assert written[0] == written[1]

    def test_it_reports_progress(self, under_test: type[Target], tmp_path: Path) -> None:
        told: list[tuple[int, int, str]] = []
        program = captured(self.models[0])
        under_test.make({}).write(program, tmp_path, lambda *a: told.append(a))
        assert told
        assert all(done <= total or not total for done, total, _ in told)
