"""What the documents and the shipped configurations say is what the code accepts."""

import re
import shlex
from pathlib import Path

import pytest

from models import tasks
from models.tabular.config import TabularConfig
from ops import cli
from ops.configuration import load
from ops.simulate import _parser as simulate_parser

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATIONS = {"tabular": TabularConfig} | {name: tasks.named(name).config for name in tasks.NAMES}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """The lines of all fenced blocks that begin with a command."""
    fences = [block for path in DOCUMENTS for block in re.findall(r"```(?:\w*)\n(.*?)```", path.read_text(), re.S)]
    starts = ("make ", "millrace ", "ray job submit ", ".venv/bin/python ")
    return [line for fence in fences for line in fence.splitlines() if line.startswith(starts)]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_configuration_is_valid(path):
    load(CONFIGURATIONS[path.parent.name], path)


def test_the_documents_hold_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_documented_command_is_one_that_exists(line):
    words = shlex.split(re.split(r"\s{2,}", line)[0])
    if words[0] == "make":
        target = words[1].split("=")[0]
        assert re.search(
            rf"^{re.escape(target)}\b|^.*\b{re.escape(target)}\b.*:", (ROOT / "Makefile").read_text(), re.M
        )
    elif words[:2] == ["millrace", "simulate"]:
        simulate_parser().parse_args(words[2:])
    elif words[0] == "millrace":
        assert words[1] in cli.PASSED_ON or cli._parser().parse_args(words[1:])
    else:
        job = words[words.index("--") + 2 :] if "--" in words else words[1:]
        assert (ROOT / job[0]).is_file()
        settings = [word for flag, word in zip(job, job[1:], strict=False) if flag == "--set"]
        if "--config" in job:
            path = ROOT / job[job.index("--config") + 1]
            load(CONFIGURATIONS[path.parent.name], path, settings)


def test_every_file_that_a_document_links_to_is_there():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_tree_names_files_that_exist():
    tree = re.search(r"## What stands where\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert tree
    folder = ""
    for line in tree.group(1).splitlines():
        if match := re.match(r"(\w+)/", line):
            folder = match.group(1)
        for name in re.findall(r"\b[\w/]+\.(?:py|yaml)\b", line):
            assert list((ROOT / folder).rglob(name)) or (ROOT / name).exists(), f"{name} in {folder}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_run(path):
    for example in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        exec(compile(example, path.name, "exec"), {})  # noqa: S102


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_are_there(path):
    names = {file.name: file for file in (ROOT / "tests").rglob("test_*.py")}
    for file, test in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", path.read_text()):
        assert file in names
        assert not test or f"def {test}(" in names[file].read_text()
