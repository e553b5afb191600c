"""All routes of the gateway, with its models' side in the same process.

Models, registry and log of predictions are small fakes, because status codes, envelopes and headers are tested here;
audio is decoded for real, and the official OpenAI client asks.
"""

import asyncio
import gzip
import io
import json
import zlib
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import orjson
import pytest
import soundfile
from fastapi.testclient import TestClient
from tritonclient.http import InferenceServerClient as Triton
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.http import InferResult as TritonResult

from models.registry import ModelVersion
from serving.gateway import create_app
from serving.metrics import ModelMetrics
from serving.server import ModelServer
from serving.service import ModelService
from serving.settings import Settings
from serving.tasks import Speech, Tabular

RATE_HZ = 8000
TRANSCRIBE = "/v1/audio/transcriptions"
INFER = "/v2/models/edits/infer"


class Listener:
    """Says how many tenths of a second a wave lasts."""

    task = "whisper"
    sample_rate_hz = RATE_HZ
    max_seconds = 1.0

    def transcribe(self, waves):
        return [SimpleNamespace(text=f"{round(len(wave) / RATE_HZ * 10)} tenths", confidence=0.5) for wave in waves]


class Robots:
    """Probability is `count`; an entity named robot counts 1, others 0."""

    task = "tabular"
    feature_service = "robots"
    features = ("count", "mean")
    threshold = 0.5

    def predict(self, rows):
        if (rows["count"] < 0).any():
            raise ZeroDivisionError("negative")
        return rows["count"]


class Features:
    features = Robots.features

    def key(self, entity):
        return entity

    def read(self, entities):
        counts = np.array([float(entity == "robot") for entity in entities])
        values = {"count": counts, "mean": np.full(len(entities), np.nan)}
        times = {"count": np.full(len(entities), 1442016000.0), "mean": np.full(len(entities), np.nan)}
        return SimpleNamespace(values=values, event_times_s=times)


class Log:
    def __init__(self):
        self.records = []

    def publish(self, record):
        self.records.append(orjson.loads(orjson.dumps(record)))

    def close(self):
        pass


class Site:
    def __init__(self, folder, registered=(("whisper", "champion"), ("edits", "champion")), **settings):
        self.settings = Settings(home=folder, mlflow_tracking_uri="", **settings)
        self.metrics = ModelMetrics()
        self.registered = dict.fromkeys(registered, 4)
        self.server = ModelServer(
            self,
            folder,
            open_task=self.open_task,
            limits={"whisper": self.settings.whisper, "tabular": self.settings.tabular},
            metrics=self.metrics,
        )
        self.server.follow(self.registered)
        self.log = Log()
        service = ModelService(self.settings, server=self.server, log=self.log, metrics=self.metrics)
        self.app = create_app(service, self.settings)
        self.http = TestClient(self.app)

    def resolve(self, name, alias):
        return ModelVersion(name, self.registered[(name, alias)], "run", {}, "source")

    def download(self, version, cache):
        return cache / version.name

    def open_task(self, folder):
        return Speech(Listener()) if folder.name == "whisper" else Tabular(Robots(), Features())

    def transcribe(self, data, **form):
        return self.http.post(TRANSCRIBE, files={"file": ("a.wav", data)}, data={"model": "whisper"} | form)

    def infer(self, inputs=(), headers=None, **more):
        return self.http.post(INFER, json={"inputs": list(inputs)} | more, headers=headers or {})


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setenv("MILLRACE_HOME", str(tmp_path))
    return Site(tmp_path)


def wav(seconds=0.5, pauses_s=()):
    """A tone with pauses of a tenth of a second around these moments."""
    buffer = io.BytesIO()
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    tone = 0.1 * np.sin(880 * np.pi * time_s)
    for pause_s in pauses_s:
        tone[np.abs(time_s - pause_s) <= 0.05] = 0
    soundfile.write(buffer, tone, RATE_HZ, format="WAV")
    return buffer.getvalue()


def test_a_transcription_comes_with_its_headers_and_leaves_a_record(site):
    answer = site.http.post(
        TRANSCRIBE,
        files={"file": ("a.wav", wav())},
        data={"model": "whisper"},
        headers={"x-request-id": "mine", "x-entity-id": "ann"},
    )
    assert answer.json() == {"text": "5 tenths"}
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["x-model-version"] == "4"
    assert answer.headers["x-variant"] == "champion"
    (record,) = site.log.records
    assert record.pop("latency_ms") > 0
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "id": "mine",
        "model": "whisper",
        "version": 4,
        "variant": "champion",
        "entity": "ann",
        "features": {},
        "features_at": {},
        "output": {"text": "5 tenths", "confidence": 0.5},
    }


def test_long_audio_is_cut_at_its_pauses(site):
    answer = site.transcribe(wav(2.2, pauses_s=(0.4, 0.8, 1.6)), response_format="verbose_json").json()
    assert answer["text"] == "8 tenths 8 tenths 6 tenths"
    assert answer["duration"] == 2.2
    borders = [border for each in answer["segments"] for border in (each["start"], each["end"])]
    assert borders == pytest.approx([0, 0.8, 0.8, 1.6, 1.6, 2.2], abs=0.01)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("text", "10 tenths 5 tenths\n"),
        (
            "srt",
            "1\n00:00:00,000 --> 00:00:01,000\n10 tenths\n\n2\n00:00:01,000 --> 00:00:01,500\n5 tenths\n\n",
        ),
        (
            "vtt",
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n10 tenths\n\n00:00:01.000 --> 00:00:01.500\n5 tenths\n\n",
        ),
    ],
)
def test_text_formats(site, form, expected):
    answer = site.transcribe(wav(1.5), response_format=form)
    assert answer.text == expected
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("data", "form", "status", "message"),
    [
        (b"", {}, 400, "empty"),
        (b"RIFF no wave at all", {}, 400, "decoded"),
        (wav()[:30], {}, 400, "audio"),
        (wav(700), {}, 400, "600 s"),
        (wav(), {"model": "whispr"}, 404, "did you mean whisper"),
        (wav(), {"model": "edits"}, 400, "does not transcribe"),
        (wav(), {"response_format": "xml"}, 400, "response_format"),
        (wav(), {"temperature": "hot"}, 400, "temperature"),
        (wav(), {"timestamp_granularities[]": "word"}, 400, "granularity 'word'"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said_in_openai_s_envelope(site, data, form, status, message):
    answer = site.transcribe(data, **form)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert site.log.records == []


def test_missing_fields_are_named(site):
    answer = site.http.post(TRANSCRIBE, data={"model": "whisper"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "file"


def test_the_official_openai_client(site):
    async def ask():
        transport = httpx.ASGITransport(app=site.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="-", http_client=http, max_retries=0)
            models = [model.id async for model in client.models.list()]
            create = client.audio.transcriptions.create
            plain = await create(model="whisper", file=("a.wav", wav()))
            verbose = await create(
                model="whisper",
                file=("a.wav", wav(1.5, pauses_s=(0.9,))),
                response_format="verbose_json",
                timestamp_granularities=["segment"],
            )
            events = [
                event
                async for event in await create(model="whisper", file=("a.wav", wav(1.5, pauses_s=(0.9,))), stream=True)
            ]
            with pytest.raises(openai.NotFoundError) as unknown:
                await create(model="gpt", file=("a.wav", wav()))
            with pytest.raises(openai.BadRequestError):
                await create(model="whisper", file=("a.wav", b"not audio"))
            return models, plain, verbose, events, unknown.value

    models, plain, verbose, events, unknown = asyncio.run(ask())
    assert models == ["edits", "whisper"]
    assert plain.text == "5 tenths"
    assert [segment.end for segment in verbose.segments] == pytest.approx([0.9, 1.5], abs=0.01)
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == "9 tenths 6 tenths"
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert unknown.code == "model_not_found"


def test_the_entity_of_the_header_decides_and_leaves_a_record(site):
    answer = site.infer(headers={"x-entity-id": "robot", "x-request-id": "mine"})
    assert answer.json() == {
        "model_name": "edits",
        "model_version": "4",
        "id": "mine",
        "outputs": [
            {"name": "probability", "datatype": "FP64", "shape": [1], "data": [1.0]},
            {"name": "isRobot", "datatype": "BOOL", "shape": [1], "data": [True]},
        ],
    }
    assert (answer.headers["x-model-version"], answer.headers["x-variant"]) == ("4", "champion")
    (record,) = site.log.records
    assert (record["id"], record["entity"]) == ("mine", "robot")
    assert record["features"] == {"count": 1.0, "mean": None}
    assert record["features_at"] == {"count": "2015-09-12T00:00:00+00:00", "mean": None}
    assert record["output"] == {"probability": 1.0, "isRobot": True}


def test_many_entities_at_once_and_features_stated_by_the_caller(site):
    entities = {"name": "entity", "datatype": "BYTES", "shape": [2, 1], "data": [["ann"], ["robot"]]}
    mean = {"name": "mean", "datatype": "FP32", "shape": [2], "data": [1.5, 2.5]}
    answer = site.infer([entities, mean], id="q").json()
    assert answer["outputs"][0]["data"] == [0.0, 1.0]
    assert [record["id"] for record in site.log.records][1].endswith("/1")
    assert [record["features"]["mean"] for record in site.log.records] == [1.5, 2.5]
    assert answer["id"] == "q"
    stated = [{"name": name, "datatype": "INT64", "shape": [1], "data": [1]} for name in Robots.features]
    assert site.infer(stated).json()["outputs"][1]["data"] == [True]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "x-entity-id"),
        ([{"name": "cuont", "datatype": "FP64", "shape": [1], "data": [1]}], "did you mean count"),
        ([{"name": "count", "datatype": "BYTES", "shape": [1], "data": ["1"]}], "must not be BYTES"),
        ([{"name": "entity", "datatype": "FP64", "shape": [1], "data": [1]}], "must not be FP64"),
        ([{"name": "count", "datatype": "FP64", "shape": [1, 2], "data": [1, 2]}], "shape"),
        ([{"name": "count", "datatype": "FP64", "shape": [0], "data": []}], "at least one"),
        (
            [
                {"name": "entity", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
                {"name": "count", "datatype": "FP64", "shape": [1], "data": [1]},
            ],
            "same number of rows",
        ),
    ],
)
def test_what_is_wrong_with_inputs_is_said_in_the_protocol_s_envelope(site, inputs, message):
    answer = site.infer(inputs)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b'{"inputs": 3}', {}, 400),
        (b'{"inputs": [], "parameters": 3}', {"x-entity-id": "a"}, 400),
        (b'{"inputs": [], "outputs": [{"name": "nothing"}]}', {"x-entity-id": "a"}, 400),
        (b'{"inputs": []}', {"inference-header-content-length": "900"}, 400),
        (b'{"inputs": []}', {"inference-header-content-length": "x"}, 400),
        (b'{"inputs": []}more', {"inference-header-content-length": "14"}, 400),
        (b"no gzip", {"content-encoding": "gzip"}, 400),
        (gzip.compress(b'{"inputs": []}', mtime=0)[:-9], {"content-encoding": "gzip"}, 400),
        (b"{}", {"content-encoding": "br"}, 415),
    ],
)
def test_broken_bodies(site, body, headers, status):
    answer = site.http.post(INFER, content=body, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]


def triton_body(**options):
    """What tritonclient sends for two entities, built by its own code."""
    entity = InferInput("entity", [2], "BYTES")
    entity.set_data_from_numpy(np.array([b"ann", b"robot"], dtype=object), binary_data=options.pop("binary", True))
    body, length = Triton.generate_request_body([entity], **options)
    return body, ({} if length is None else {"Inference-Header-Content-Length": str(length)})


def triton_result(answer):
    length = answer.headers.get("inference-header-content-length")
    return TritonResult.from_response_body(answer.content, header_length=int(length) if length else None)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compress", [None, gzip.compress, zlib.compress])
def test_tritonclient_s_bodies(site, binary, compress):
    outputs = [InferRequestedOutput(name, binary_data=binary) for name in ("isRobot", "probability")]
    body, headers = triton_body(binary=binary, outputs=outputs)
    if compress:
        body = compress(body)
        headers["Content-Encoding"] = "gzip" if compress is gzip.compress else "deflate"
    result = triton_result(site.http.post(INFER, content=body, headers=headers))
    assert result.as_numpy("isRobot").tolist() == [False, True]
    assert result.as_numpy("probability").tolist() == [0, 1]


def test_without_named_outputs_tritonclient_gets_all_in_binary(site):
    body, headers = triton_body()
    answer = site.http.post(INFER, content=body, headers=headers)
    assert "inference-header-content-length" in answer.headers
    assert triton_result(answer).as_numpy("probability").tolist() == [0, 1]


def test_audio_by_the_open_inference_protocol(site):
    buffer = np.array([wav(0.5), wav(0.7)], dtype=object)
    audio = InferInput("audio", [2], "BYTES").set_data_from_numpy(buffer)
    body, length = Triton.generate_request_body([audio])
    headers = {"Inference-Header-Content-Length": str(length)}
    answer = site.http.post("/v2/models/whisper/infer", content=body, headers=headers)
    assert triton_result(answer).as_numpy("text").tolist() == [b"5 tenths", b"7 tenths"]
    refused = site.http.post("/v2/models/whisper/infer", json={"inputs": []})
    assert "audio, of BYTES" in refused.json()["error"]


def test_metadata_health_and_index(site):
    get = site.http.get
    assert get("/v2/health/live").status_code == get("/v2/health/ready").status_code == 200
    assert "binary_tensor_data" in get("/v2").json()["extensions"]
    metadata = get("/v2/models/edits").json()
    assert metadata == get("/v2/models/edits/versions/4").json()
    assert metadata["versions"] == ["4"]
    assert [each["name"] for each in metadata["inputs"]] == ["entity", "count", "mean"]
    assert metadata["outputs"][1] == {"name": "isRobot", "datatype": "BOOL", "shape": [-1]}
    assert get("/v2/models/edits/ready").status_code == 200
    for path in ("/v2/models/none/ready", "/v2/models/edits/versions/9/ready", "/v2/models/edits/versions/x"):
        assert get(path).status_code == 404
    site.infer(headers={"x-entity-id": "a"})
    stats = get("/v2/models/edits/stats").json()["model_stats"][0]["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (1, 0)
    index = site.http.post("/v2/repository/index").json()
    assert [(each["name"], each["state"]) for each in index] == [("edits", "READY"), ("whisper", "READY")]
    assert site.http.post("/v2/repository/models/edits/load").status_code == 200
    assert site.http.post("/v2/repository/models/edits/unload").status_code == 400


def test_an_empty_registry_is_ready_and_serves_nothing(tmp_path):
    site = Site(tmp_path, registered=())
    assert site.http.get("/livez").status_code == 200
    assert site.http.get("/readyz").json() == {"status": "ready", "queue_size": 0, "models": {}}
    assert site.http.get("/v1/models").json() == {"object": "list", "data": []}
    answer = site.transcribe(wav())
    assert answer.status_code == 404
    assert "run ray_jobs/train_whisper.py" in answer.json()["error"]["message"]


def test_a_body_over_the_limit_is_413_whether_it_declares_its_length_or_not(tmp_path):
    site = Site(tmp_path, max_body_bytes=1000)
    declared = site.transcribe(wav())
    assert declared.status_code == 413
    assert declared.json()["error"]["code"] == "body_too_large"
    streamed = site.http.post(INFER, content=(b" " * 400 for _ in range(4)))
    assert streamed.status_code == 413
    bomb = site.http.post(INFER, content=gzip.compress(b" " * 5000), headers={"content-encoding": "gzip"})
    assert bomb.status_code == 413


def test_keys(tmp_path):
    site = Site(tmp_path, api_keys=("good", "other"))
    assert site.http.get("/livez").status_code == site.http.get("/readyz").status_code == 200
    for headers in ({}, {"authorization": "Basic good"}, {"authorization": "Bearer bad"}, {"authorization": "Bearer "}):
        for path in ("/v1/models", "/v2", "/metrics", "/docs", "/nothing"):
            assert site.http.get(path, headers=headers).status_code == 401
    refused = site.http.get("/v1/models", headers={"authorization": "Bearer bad"})
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert list(site.http.get("/v2").json()) == ["error"]
    for key in ("good", "other"):
        assert site.http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_a_model_that_fails_gives_500_in_the_envelope_and_no_traceback(site):
    stated = [{"name": name, "datatype": "FP64", "shape": [1], "data": [-1]} for name in Robots.features]
    answer = site.infer(stated, headers={"x-request-id": "mine"})
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server failed; its log has the request mine"}
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("given", ["", "x" * 200, "tab\there"])
def test_a_request_id_that_cannot_be_used_is_replaced(site, given):
    answer = site.http.get("/livez", headers={"x-request-id": given})
    assert len(answer.headers["x-request-id"]) == 32


def test_unknown_paths_and_methods_have_the_envelope_of_their_protocol(site):
    assert site.http.get("/v1/nothing").json()["error"]["message"].startswith("there is no /v1/nothing")
    assert site.http.get("/v2/nothing").json()["error"].startswith("there is no")
    assert site.http.get("/nothing").json()["detail"].startswith("there is no")
    assert site.http.get(INFER).status_code == 405


def test_metrics_and_docs(site):
    site.infer(headers={"x-entity-id": "a"})
    site.infer()
    text = site.http.get("/metrics").text
    route = 'route="/v2/models/{model}/infer"'
    assert f'millrace_http_requests_total{{method="POST",{route},status="200"}} 1.0' in text
    assert f'millrace_http_requests_total{{method="POST",{route},status="400"}} 1.0' in text
    assert 'millrace_model_errors_total{code="missing_entity",model="edits"} 1.0' in text
    assert 'millrace_model_version{model="edits",variant="champion"} 4.0' in text
    for name in ("http_request_seconds_bucket", "batch_size_bucket", "queue_depth", "predictions_published_total"):
        assert f"millrace_{name}" in text
    assert site.http.get("/docs").status_code == 200
    assert TRANSCRIBE in json.dumps(site.http.get("/openapi.json").json())
