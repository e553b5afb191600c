"""Addresses of the stack: whose services they are, and what a shell gets to see of them."""

import os
import subprocess
from pathlib import Path

import pytest

from ops.environment import Environment
from ops.layout import Layout, Ports, binaries_folder
from ops.record import Record


def environment(home: Path, **variables: str) -> Environment:
    return Environment.read({"MILLRACE_HOME": str(home)} | variables)


def activated(layout: Layout, command: str, **outer: str) -> str:
    """What `command` prints in a bash that has evaluated the layout's lines."""
    script = f'eval "$LINES_OF_ENV"; {command}'
    environ = {"PATH": os.environ["PATH"], "LINES_OF_ENV": layout.shell()} | outer
    done = subprocess.run(["bash", "-uec", script], env=environ, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_address_in_the_environment_is_somebody_elses(home: Path) -> None:
    layout = Layout.of(environment(home, KAFKA_BOOTSTRAP_SERVERS="k:9092", MLFLOW_TRACKING_URI="http://m"), Ports())
    assert (layout.external_kafka, layout.external_mlflow) == ("k:9092", "http://m")
    assert (layout.kafka, layout.mlflow) == ("k:9092", "http://m")


@pytest.mark.parametrize("ports", [Ports(), Ports(kafka=1234, mlflow=4321)])
def test_the_addresses_that_env_printed_are_our_own(home: Path, ports: Ports) -> None:
    printed = Layout(home, ports).variables()
    names = ("KAFKA_BOOTSTRAP_SERVERS", "MLFLOW_TRACKING_URI")
    again = Layout.of(environment(home, **{name: printed[name] for name in names}), Ports(), known=ports)
    assert again.external_kafka is None
    assert again.external_mlflow is None
    assert again.ports == Ports()


def test_the_sqlite_file_that_jobs_use_without_a_stack_is_our_own(home: Path) -> None:
    uri = environment(home).tracking_uri
    assert Layout.of(environment(home, MLFLOW_TRACKING_URI=uri), Ports()).external_mlflow is None


def test_a_recorded_layout_is_read_back(home: Path) -> None:
    layout = Layout(home, Ports(serve=18000), external_kafka="k:1")
    record = Record.read(home)
    record.begin(layout.record())
    assert Layout.current(environment(home)).ports == Ports()  # nothing is up
    record.put("kafka", {})
    assert Layout.current(environment(home)) == layout


def test_the_server_binds_loopback_unless_keys_protect_it(home: Path) -> None:
    assert Layout(home).serve_host == "127.0.0.1"
    assert Layout(home, api_keys=("secret",)).serve_host == "0.0.0.0"


def test_a_shell_gets_every_variable_as_it_is_whatever_the_path_holds(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "a home; with $HOME `id` 'quotes'", Ports(dashboard=18265))
    for name, value in layout.variables().items():
        assert activated(layout, f'printf %s "${name}"') == value
    assert layout.variables()["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:18265"


def test_a_shell_finds_this_environments_commands_first_and_once(home: Path) -> None:
    layout = Layout(home)
    found = activated(layout, 'command -v ray; eval "$LINES_OF_ENV"; printf %s "$PATH"', PATH="/usr/bin:/bin")
    command, path = found.split("\n")
    assert command == str(binaries_folder() / "ray")
    assert path.split(":").count(str(binaries_folder())) == 1


def test_a_token_of_another_ray_is_taken_out_of_the_shell(home: Path) -> None:
    shown = activated(
        Layout(home), 'printf %s "${RAY_ADDRESS-}${RAY_AUTH_TOKEN-}"', RAY_ADDRESS="x", RAY_AUTH_TOKEN="y"
    )
    assert shown == ""
