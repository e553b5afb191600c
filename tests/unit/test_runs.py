"""The folders that training runs hold."""

from pathlib import Path

import pytest

from models.runs import RunError, claimed


def test_an_unfinished_name_goes_on_and_a_finished_one_starts_afresh(tmp_path: Path) -> None:
    with claimed(tmp_path, "digits", "h") as claim:
        assert claim.run_id is None
        claim.remember("run-1", finished=False)
    with claimed(tmp_path, "digits", "h") as claim:
        assert (claim.name, claim.run_id) == ("digits", "run-1")
        claim.remember("run-1", finished=True)
    with claimed(tmp_path, "digits", "another") as claim:
        assert (claim.name, claim.run_id) == ("digits-2", None)


def test_a_name_that_is_in_use_or_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, "digits", "h") as claim:
        claim.remember("run-1", finished=False)
        with pytest.raises(RunError, match="another process"), claimed(tmp_path, "digits", "h"):
            pass
    with pytest.raises(RunError, match="another configuration"), claimed(tmp_path, "digits", "other"):
        pass
