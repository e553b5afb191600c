"""The whole serving application on a local Ray Serve, asked by the clients that other people use.

Real registry, real models (tiny, untrained where that does not matter), real Feast store, real Kafka.
"""

import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import openai
import orjson
import pandas as pd
import pytest
import skops.io
import soundfile
from feast import FeatureStore
from kafka import KafkaConsumer, TopicPartition
from mlflow import MlflowClient
from ray import serve
from sklearn.ensemble import HistGradientBoostingClassifier
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from models.registry import Registry
from models.tabular.train import MODEL_FILE
from models.whisper import network
from models.whisper.predict import WhisperPredictor
from ops.ports import free_ports
from serving.app import build
from tests.waiting import wait_for

RATE_HZ = 8000
FEATURE = "sum_added_1h"
WAIT_S = 120


def tabular_folder(folder: Path, robots_add_more: bool) -> Path:
    """A classifier of one feature: above 500 on one side, below or missing on the other."""
    folder.mkdir()
    added = np.array([0.0, 100.0, 900.0, 1000.0, np.nan] * 10)
    labels = (added > 500) == robots_add_more
    classifier = HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=2).fit(added[:, None], labels)
    skops.io.dump(classifier, folder / MODEL_FILE)
    description = {"task": "tabular", "feature_service": "edits_robot", "features": [FEATURE], "threshold": 0.5}
    (folder / "model.json").write_text(json.dumps(description))
    return folder


def whisper_folder(folder: Path) -> Path:
    tokens = network.tokenizer(None)
    features = network.extractor(None, RATE_HZ, 2, 16, 20.0)
    sizes = {"width": 16, "layers": 1, "heads": 2, "dropout": 0.0, "max_tokens": 8}
    WhisperPredictor(network.small(tokens, features, **sizes), tokens, features).save(folder)
    return folder


def register(registry: Registry, uri: str, name: str, folder: Path) -> int:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("millrace")
    run = client.create_run(experiment.experiment_id)
    version = registry.register(name, folder, run_id=run.info.run_id, tags={}).version
    registry.set_alias(name, "champion", version, "test")
    return version


def write_features(repo: Path) -> None:
    """One editor who added much, as the stream would have left it."""
    store = FeatureStore(repo_path=str(repo))
    view = store.get_stream_feature_view("editor_activity")
    row = {field.name: [0] if field.name.startswith("count") else [0.0] for field in view.features}
    row |= {FEATURE: [900.0], "user": ["bot"]}
    at = pd.Timestamp("2015-09-12T10:00:00Z")
    row |= {"event_timestamp": [at], "created_timestamp": [at], "time": [at]}
    store.write_to_online_store("editor_activity", pd.DataFrame(row))


def wav(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(round(seconds * RATE_HZ)) / 5), RATE_HZ, format="WAV")
    return buffer.getvalue()


def predictions(bootstrap_servers: str, ids: set[str]) -> dict[str, dict[str, object]]:
    """Records of the topic by id, once all of `ids` are there."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap_servers, enable_auto_commit=False)
    found: dict[str, dict[str, object]] = {}

    def read() -> bool:
        if not consumer.assignment() and (numbers := consumer.partitions_for_topic("predictions")):
            consumer.assign([TopicPartition("predictions", number) for number in numbers])
            consumer.seek_to_beginning()
        for records in consumer.poll(timeout_ms=200).values() if consumer.assignment() else ():
            found.update((record.key.decode(), orjson.loads(record.value)) for record in records)
        return ids <= found.keys()

    wait_for(read, "all records", WAIT_S)
    consumer.close()
    return found


class Site:
    def __init__(self, address: str, registry: Registry, uri: str, kafka: str, versions: dict[str, int]) -> None:
        self.address = address
        self.registry = registry
        self.uri = uri
        self.kafka = kafka
        self.versions = versions
        self.http = httpx.Client(base_url=f"http://{address}", timeout=WAIT_S)


@pytest.fixture
def site(ray_local: None, kafka: str, mlflow_uri: str, home: Path, repo: Path, tmp_path: Path) -> Iterator[Site]:
    registry = Registry(mlflow_uri)
    write_features(repo)
    versions = {
        "edits": register(registry, mlflow_uri, "edits", tabular_folder(tmp_path / "more", True)),
        "whisper": register(registry, mlflow_uri, "whisper", whisper_folder(tmp_path / "whisper")),
    }
    (port,) = free_ports(1)
    args = {
        "home": str(home),
        "mlflow_tracking_uri": mlflow_uri,
        "kafka_bootstrap_servers": kafka,
        "poll_s": 0.2,
        "max_body_bytes": 1_000_000,
        # Generous: the first read opens the store, and CI machines are slow.
        "features": {"repo": str(repo), "deadline_ms": 20_000},
    }
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build(args), name="millrace", route_prefix="/")
        running = Site(f"127.0.0.1:{port}", registry, mlflow_uri, kafka, versions)
        wait_for(lambda: running.http.get("/readyz").status_code == 200, "all models", WAIT_S)
        yield running
        running.http.close()
    finally:
        serve.shutdown()


def test_the_application_by_its_clients(site: Site, tmp_path: Path) -> None:
    """One start serves all checks, because it takes most of the time."""
    check_openai(site)
    check_triton(site)
    check_limits(site)
    check_records(site)
    check_swap(site, tmp_path)


def check_openai(site: Site) -> None:
    client = openai.OpenAI(base_url=f"http://{site.address}/v1", api_key="-", timeout=WAIT_S)
    assert [model.id for model in client.models.list()] == ["edits", "whisper"]
    create = client.audio.transcriptions.create
    answer = create(
        model="whisper",
        file=("a.wav", wav(3.0)),
        response_format="verbose_json",
        extra_headers={"x-request-id": "heard"},
    )
    assert answer.duration == 3.0
    cut_s, end_s = (segment.end for segment in answer.segments)
    assert 1 <= cut_s <= 2
    assert end_s == 3
    for content in (b"", b"no audio"):
        with pytest.raises(openai.BadRequestError):
            create(model="whisper", file=("a.wav", content))
    with pytest.raises(openai.NotFoundError):
        create(model="gpt", file=("a.wav", wav(1.0)))


def check_triton(site: Site) -> None:
    client = InferenceServerClient(site.address, network_timeout=WAIT_S, connection_timeout=WAIT_S)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("edits")
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["name"] == "millrace"
    assert [each["name"] for each in client.get_model_metadata("edits")["inputs"]] == ["entity", FEATURE]
    assert {each["name"] for each in client.get_model_repository_index()} == {"edits", "whisper"}
    for entity, is_robot in (("bot", True), ("nobody", False)):
        result = client.infer("edits", [], headers={"x-entity-id": entity, "x-request-id": f"asked-{entity}"})
        assert result.as_numpy("isRobot").tolist() == [is_robot]
    names = np.array([b"nobody", b"bot"], dtype=object)
    for binary in (True, False):
        entities = InferInput("entity", [2], "BYTES").set_data_from_numpy(names, binary_data=binary)
        for compression in (None, "gzip", "deflate"):
            result = client.infer("edits", [entities], request_compression_algorithm=compression)
            assert result.as_numpy("isRobot").tolist() == [False, True]
    with pytest.raises(InferenceServerException, match="x-entity-id"):
        client.infer("edits", [])
    with pytest.raises(InferenceServerException, match="not served"):
        client.infer("none", [])
    client.close()


def check_limits(site: Site) -> None:
    assert site.http.post("/v2/models/edits/infer", content=b" " * 1_000_001).status_code == 413
    assert site.http.get("/livez").status_code == site.http.get("/docs").status_code == 200


def check_records(site: Site) -> None:
    found = predictions(site.kafka, {"heard", "asked-bot", "asked-nobody"})
    assert found["heard"]["model"] == "whisper"
    known, unknown = found["asked-bot"], found["asked-nobody"]
    assert (known["version"], known["variant"], known["entity"]) == (site.versions["edits"], "champion", "bot")
    assert known["features"] == {FEATURE: 900.0}
    at = datetime.fromisoformat(known["features_at"][FEATURE])  # type: ignore[index]
    assert at == datetime(2015, 9, 12, 10, tzinfo=UTC)
    assert known["output"]["isRobot"] is True  # type: ignore[index]
    assert unknown["features"] == {FEATURE: None}
    wait_for(
        lambda: "millrace_predictions_published_total 0.0" not in site.http.get("/metrics").text,
        "the count of published predictions",
        WAIT_S,
    )
    metrics = site.http.get("/metrics").text
    assert 'millrace_feature_misses_total{reason="missing",view="editor_activity"}' in metrics
    assert 'reason="error"' not in metrics


def check_swap(site: Site, tmp_path: Path) -> None:
    """Requests go on while the alias moves; each is answered by one version or the other."""
    version = register(site.registry, site.uri, "edits", tabular_folder(tmp_path / "less", False))
    versions: list[int] = []

    def ask() -> bool:
        answer = site.http.post("/v2/models/edits/infer", json={"inputs": []}, headers={"x-entity-id": "bot"})
        assert answer.status_code == 200, answer.text
        versions.append(int(answer.headers["x-model-version"]))
        is_robot = answer.json()["outputs"][1]["data"]
        assert is_robot == [versions[-1] == site.versions["edits"]]
        return versions[-1] == version

    wait_for(ask, "the new version", WAIT_S)
    assert versions == sorted(versions)
