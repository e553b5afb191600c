"""The jar cache: whole and right files only, whatever happened to an earlier fetch."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ops import jars
from ops.jars import Jar, JarError

CONTENT = b"a jar"


@pytest.fixture
def jar() -> Jar:
    return Jar("org.example", "thing", "1.0", hashlib.sha256(CONTENT).hexdigest())


def serving(*answers: bytes | Exception) -> tuple[Callable[[Jar, Path], Path], list[Jar]]:
    """A download that gives these answers in turn: the repository itself needs a network."""
    asked: list[Jar] = []

    def download(jar: Jar, scratch: Path) -> Path:
        answer = answers[len(asked)]
        asked.append(jar)
        if isinstance(answer, Exception):
            raise answer
        path = scratch / jar.file_name
        path.write_bytes(answer)
        return path

    return download, asked


def test_the_list_names_46_jars_with_sha256() -> None:
    listed = jars.read_list()
    assert len(listed) == 46
    assert all(len(jar.sha256) == 64 for jar in listed)
    assert "org.apache.kafka:kafka_2.13:4.3.1" in map(str, listed)
    assert len({jar.file_name for jar in listed}) == 46


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# comment\n\norg.example:thing 123\n")
    with pytest.raises(JarError, match=r"list\.txt, line 3.*group:artifact:version"):
        jars.read_list(path)


def test_fetch_brings_what_is_missing_and_nothing_else(tmp_path: Path, jar: Jar) -> None:
    download, asked = serving(CONTENT)
    assert jars.missing(tmp_path, [jar]) == [jar]
    assert jars.fetch(tmp_path, [jar], download) == [jar]
    assert (tmp_path / "thing-1.0.jar").read_bytes() == CONTENT
    assert jars.fetch(tmp_path, [jar], download) == []
    assert jars.missing(tmp_path, [jar]) == []
    assert asked == [jar]
    assert [path.name for path in tmp_path.iterdir()] == ["thing-1.0.jar"]


def test_a_damaged_jar_is_fetched_again(tmp_path: Path, jar: Jar) -> None:
    (tmp_path / jar.file_name).write_bytes(CONTENT[:2])
    download, _ = serving(CONTENT)
    assert jars.fetch(tmp_path, [jar], download) == [jar]
    assert (tmp_path / jar.file_name).read_bytes() == CONTENT


def test_a_half_written_download_never_becomes_a_jar(tmp_path: Path, jar: Jar) -> None:
    download, asked = serving(CONTENT[:3], ConnectionError("reset"), CONTENT)
    jars.fetch(tmp_path, [jar], download)
    assert len(asked) == 3
    assert (tmp_path / jar.file_name).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "reason"), [(b"other", "sha256 differs"), (ConnectionError("no route"), "ConnectionError: no route")]
)
def test_a_jar_that_cannot_be_had_is_named_with_the_reason(
    tmp_path: Path, jar: Jar, answer: bytes | Exception, reason: str
) -> None:
    download, _ = serving(*[answer] * jars.ATTEMPTS)
    with pytest.raises(JarError, match=rf"org\.example:thing:1\.0 could not be fetched .*{reason}"):
        jars.fetch(tmp_path, [jar], download)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jars.cache_folder() == tmp_path / "millrace" / "jars"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert jars.cache_folder() == tmp_path / "user" / ".cache" / "millrace" / "jars"
