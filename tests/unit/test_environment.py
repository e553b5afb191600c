from pathlib import Path

from ops.environment import Environment


def test_nothing_set_means_the_folder_here_and_no_addresses():
    environment = Environment.read({})
    assert environment.home == Path.cwd() / ".millrace"
    assert (environment.kafka_bootstrap_servers, environment.data, environment.api_keys) == (None, None, ())
    assert environment.tracking_uri == f"sqlite:///{Path.cwd()}/.millrace/mlflow/mlflow.db"


def test_values_are_stripped_and_empty_ones_do_not_count():
    environment = Environment.read(
        {
            "MILLRACE_HOME": "there",
            "MILLRACE_DATA": "",
            "KAFKA_BOOTSTRAP_SERVERS": " a:1 ",
            "MILLRACE_API_KEYS": "one, ,two",
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        }
    )
    assert environment.home == Path.cwd() / "there"
    assert environment.data is None
    assert environment.kafka_bootstrap_servers == "a:1"
    assert environment.api_keys == ("one", "two")
    assert environment.tracking_uri == "http://127.0.0.1:5000"
