"""Feast's classes as they are written, which is what `streaming` sees to before Feast is imported."""

import subprocess
import sys

import pytest

CHECK = """
import {package}, feast
assert "check_argument_types_internal" not in feast.Entity.__init__.__code__.co_names, "typeguard has rewritten it"
assert feast.Entity(name="user", join_keys=["user"]).join_key == "user"
"""


@pytest.mark.parametrize("package", ["ops", "serving", "streaming"])
def test_typeguard_leaves_feast_as_it_is(package):
    done = subprocess.run([sys.executable, "-c", CHECK.format(package=package)], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()


OTHERS = """
import streaming, typeguard

@typeguard.typechecked
def half(number: int) -> float:
    return number / 2

@typeguard.typechecked(collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
def total(numbers: list[int]) -> int:
    return sum(numbers)

for call in (lambda: half("3"), lambda: total([1, 2.5])):
    try:
        call()
    except typeguard.TypeCheckError:
        continue
    raise SystemExit("typeguard does not check")
"""


def test_typeguard_checks_what_others_ask_it_to(tmp_path):
    script = tmp_path / "others.py"  # typeguard reads the source
    script.write_text(OTHERS)
    done = subprocess.run([sys.executable, script], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()
