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
