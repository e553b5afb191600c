import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_cluster_file_follows_rays_own_schema(cluster):
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(cluster | {"max_worker": 1}, schema)


@pytest.mark.parametrize("key", ["setup_commands", "head_start_ray_commands", "worker_start_ray_commands"])
def test_its_commands_are_valid_shell(cluster, key):
    for command in cluster[key]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_node_starts_ray_with_a_token(cluster):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        start = next(command for command in cluster[key] if "ray start" in command)
        assert "RAY_AUTH_MODE=token" in start
