import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import packages
from tools.errors import PrepareError
from tools.packages import DebianPackage, PythonPackage, find, run, unpack


def test_unpacks_wheels_and_source_archives(tmp_path: Path) -> None:
    wheel, source = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/one", "1")
    with tarfile.open(source, "w:gz") as archive:
        entry = tarfile.TarInfo("package/two")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"2"))
    for archive_path in (wheel, source):
        unpack(archive_path, tmp_path / "out")
    assert find(tmp_path / "out", "*/one").read_text() == "1"
    assert find(tmp_path / "out", "*/two").read_text() == "2"


def test_an_unknown_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"model\.rar is no kind of archive"):
        unpack(tmp_path / "model.rar", tmp_path)


def test_a_source_archive_cannot_write_outside_its_folder(tmp_path: Path) -> None:
    source = tmp_path / "a.tar.gz"
    with tarfile.open(source, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(source, tmp_path / "out")


@pytest.mark.parametrize("names", [[], ["a.bin", "b.bin"]])
def test_finds_one_file_or_fails(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(PrepareError, match=rf"\*\.bin in the package, found {len(names)}"):
        find(tmp_path, "*.bin")


def test_a_failed_command_tells_its_output_and_the_remedy() -> None:
    with pytest.raises(PrepareError, match=r"failed \(3\):\nno such thing\n  next: do that"):
        run(["sh", "-c", "echo no such thing >&2; exit 3"], remedy="do that")


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrepareError, match="apt-get is not on this machine"):
        DebianPackage("python3.11-doc").fetch(tmp_path / "out")


def test_pip_gets_the_hash_and_unpacks_what_it_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements: list[str] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        requirements.append(Path(command[-1]).read_text())
        archives = Path(command[command.index("--dest") + 1])
        archives.mkdir()
        with zipfile.ZipFile(archives / "thing-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("thing/data", "content")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    PythonPackage("thing", "1.0", "abc").fetch(tmp_path / "thing")
    assert requirements == ["thing==1.0 --hash=sha256:abc\n"]
    assert (tmp_path / "thing/thing/data").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
