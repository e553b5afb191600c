"""The broker's class path: the jars of `kafka-jars.txt`, fetched once into a cache and checked against their sha256.

`python -m ops.jars` fetches what is missing or damaged and prints the cache folder.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("kafka-jars.txt")
THREADS = 8
ATTEMPTS = 3
TIMEOUT_S = 60


class JarError(ValueError):
    """A jar could not be fetched, or is not the one that the list names."""


@dataclass(frozen=True)
class Jar:
    """One pinned artifact of a Maven repository."""

    group: str
    artifact: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name in the cache, as Maven itself would name the file."""
        return f"{self.artifact}-{self.version}.jar"

    def __str__(self) -> str:
        """Return the coordinates, as Maven users write them."""
        return f"{self.group}:{self.artifact}:{self.version}"


Download = Callable[[Jar, Path], Path]


def read_list(path: Path = LIST) -> list[Jar]:
    """Read `group:artifact:version sha256` lines; lines that begin with # are comments."""
    jars = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            coordinates, sha256 = line.split()
            group, artifact, version = coordinates.split(":")
        except ValueError:
            raise JarError(
                f"{path.name}, line {number}: expected `group:artifact:version sha256`, got {line!r}"
            ) from None
        jars.append(Jar(group, artifact, version, sha256))
    return jars


def cache_folder() -> Path:
    """Return the folder that every checkout of this user shares: `$XDG_CACHE_HOME/millrace/jars`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millrace" / "jars"


def missing(folder: Path, jars: list[Jar] | None = None) -> list[Jar]:
    """Return the jars that are not in `folder`; a file is there only whole, so its name is enough."""
    return [jar for jar in jars or read_list() if not (folder / jar.file_name).is_file()]


def fetch(folder: Path, jars: list[Jar] | None = None, download: Download | None = None) -> list[Jar]:
    """Bring `folder` to hold every jar with the right sha256; returns those that had to be fetched.

    Safe beside another fetch into the same folder, and after one that was killed: a jar appears by rename, once whole
    and checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [jar for jar in jars or read_list() if not _is_right(folder / jar.file_name, jar)]
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(lambda jar: _fetch_one(jar, folder, download or _download), wanted))
    return wanted


def class_path(folder: Path) -> str:
    """Return what `java -cp` takes, after fetching the jars that are missing."""
    jars = read_list()
    fetch(folder, missing(folder, jars))
    return os.pathsep.join(str(folder / jar.file_name) for jar in jars)


def _is_right(path: Path, jar: Jar) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == jar.sha256


def _fetch_one(jar: Jar, folder: Path, download: Download) -> None:
    problem = ""
    for _ in range(ATTEMPTS):
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            try:
                path = download(jar, Path(scratch))
            except Exception as error:  # jgo and the HTTP client under it share no base class
                problem = f"{type(error).__name__}: {error}"
                continue
            if _is_right(path, jar):
                path.replace(folder / jar.file_name)
                return
            problem = f"the sha256 differs from that in {LIST.name}"
    raise JarError(f"{jar} could not be fetched from Maven Central ({problem}); check the network and run it again")


def _download(jar: Jar, scratch: Path) -> Path:
    from jgo.maven import MavenContext

    context = MavenContext(repo_cache=scratch, timeout=TIMEOUT_S)
    return Path(context.project(jar.group, jar.artifact).at_version(jar.version).artifact().resolve())


def main() -> None:
    """Fetch all jars; prints one line, exits with 1 and a sentence if one cannot be had."""
    folder = cache_folder()
    try:
        fetched = fetch(folder)
    except JarError as error:
        sys.exit(str(error))
    print(f"{len(read_list())} jars in {folder}, {len(fetched)} of them fetched now")


if __name__ == "__main__":
    main()
