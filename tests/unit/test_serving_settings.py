"""serve.yaml and the settings behind its `args`."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving.settings import Settings, SettingsError

SERVE_YAML = Path(__file__).parents[2] / "serving" / "serve.yaml"


def test_serve_yaml_is_what_ray_takes_and_its_arguments_are_the_defaults():
    config = ServeDeploySchema.model_validate(yaml.safe_load(SERVE_YAML.read_text()))
    (application,) = config.applications
    assert application.import_path == "serving.app:build"
    assert [each.name for each in application.deployments] == ["Gateway", "Models"]
    assert config.http_options.host == "127.0.0.1"
    environ = {"MILLRACE_HOME": "/state"}
    assert Settings.read(application.args, environ) == Settings.read({}, environ)


def test_arguments_go_before_the_environment():
    environ = {
        "MILLRACE_HOME": "/state",
        "MILLRACE_API_KEYS": "a, b,",
        "KAFKA_BOOTSTRAP_SERVERS": "k:9092",
        "MLFLOW_TRACKING_URI": "http://m:5000",
    }
    read = Settings.read({}, environ)
    assert read.api_keys == ("a", "b")
    assert (read.kafka_bootstrap_servers, read.mlflow_tracking_uri) == ("k:9092", "http://m:5000")
    assert Settings.read({"api_keys": ["c"]}, environ).api_keys == ("c",)
    assert Settings.read({}, {"MILLRACE_HOME": "/state"}).mlflow_tracking_uri == "sqlite:////state/mlflow/mlflow.db"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"timeout": 3}, "timeout"),
        ({"features": {"clock": "sun"}}, "features.clock"),
        ({"whisper": {"max_batch_size": 0, "max_queue": 1}}, "whisper.max_batch_size"),
        ({"aliases": []}, "aliases"),
    ],
)
def test_a_wrong_argument_is_named(args, named):
    with pytest.raises(SettingsError, match=f"argument {named} "):
        Settings.read(args, {})
