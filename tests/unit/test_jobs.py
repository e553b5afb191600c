import json

import pytest

from ops import jobs
from ops.configuration import ConfigurationError


def finish(capfd, main):
    with pytest.raises(SystemExit) as ended:
        jobs.run(main)
    out, err = capfd.readouterr()
    return ended.value.code, out, err


def test_result_is_one_json_line(capfd):
    code, out, _ = finish(capfd, lambda: {"wer": 0.5, "name": "x\ny"})
    assert code == 0
    assert json.loads(out) == {"wer": 0.5, "name": "x\ny"}
    assert out.count("\n") == 1


@pytest.mark.parametrize("error", [jobs.JobError("no\nfolder"), ConfigurationError("no folder")])
def test_a_users_error_is_one_line_and_exit_code_2(capfd, error):
    def main():
        raise error

    code, out, err = finish(capfd, main)
    assert (code, out, err) == (2, "", "error: no folder\n")


def test_the_result_of_a_failed_check_is_printed_too(capfd):
    def main():
        raise jobs.JobError("2 differ", {"differ": 2})

    assert finish(capfd, main) == (2, '{"differ": 2}\n', "error: 2 differ\n")


def test_a_librarys_error_keeps_its_traceback():
    with pytest.raises(ValueError, match="Expecting value"):
        jobs.run(lambda: json.loads("nonsense"))


def test_a_job_takes_configuration_and_overrides():
    arguments = jobs.parser("x", config="configs/a.yaml").parse_args(["--set", "a=1", "--set", "b=2"])
    assert str(arguments.config) == "configs/a.yaml"
    assert arguments.overrides == ["a=1", "b=2"]
