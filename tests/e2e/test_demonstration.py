"""The commands of the README on one stack that is up, in the order in which a user would come to them."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import soundfile
import tritonclient.http
from kafka import KafkaConsumer, TopicPartition

from ops import requests
from ops.broker import Broker, answers
from ops.ports import free_ports
from streaming.report import read_views
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).resolve().parents[2]


def stream_rows(demonstration):
    return list(read_views(demonstration.layout.stream)["editor_activity"].values())


def test_demonstration_shows_every_part_at_work(demonstration):
    figures = demonstration.figures
    stream = figures["stream"]
    assert stream["processed"] == stream["messages"]
    assert stream["dead"] == stream["late"] == 0
    assert figures["freshness"]["probes"] >= 50
    assert figures["edits"]["auroc"] > 0.8
    assert figures["speech"]["wer_after"] < 0.5 < figures["speech"]["wer_before"]
    assert figures["evaluation"]["champion"]["wer_high"] < figures["evaluation"]["baseline"]["wer_low"]
    assert figures["transcription"]["requests"] >= 30
    for number in range(1, 8):
        assert f"[{number}/7]" in demonstration.said
    html = Path(figures["report"])
    assert 1_000 < html.stat().st_size < 2_000_000


def test_status_is_a_table_in_which_everything_is_up(demonstration):
    done = demonstration.shell("millrace status")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("kafka", "ray", "mlflow", "features", "serve", "stream"):
        assert part in done.stdout
    assert "lag 0" in done.stdout


def test_up_again_changes_nothing(demonstration):
    before = json.loads((demonstration.home / "stack.json").read_text())["parts"]
    done = demonstration.shell("millrace up")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((demonstration.home / "stack.json").read_text())["parts"] == before


def test_a_job_with_a_bad_configuration_says_why_in_one_line(demonstration):
    done = demonstration.shell("ray job submit -- python ray_jobs/train_whisper.py --set train.stepz=3")
    assert done.returncode != 0
    assert "unknown key train.stepz (did you mean steps?)" in done.stdout + done.stderr


def test_openai_client_transcribes(demonstration):
    digits = requests.utterances(ROOT / "configs/whisper/digits.yaml", data(), demonstration.home, 1)[0]
    with openai.OpenAI(base_url=f"{demonstration.layout.serve}/v1", api_key="none") as client:
        assert {"whisper", "edits"} <= {model.id for model in client.models.list()}
        text = client.audio.transcriptions.create(model="whisper", file=("digits.wav", digits)).text
        known = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
        assert text
        assert set(text.lower().split()) & known
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(model="whisper", file=("empty.wav", b""))
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(model="whisper", file=("broken.wav", b"RIFFnonsense"))
        with pytest.raises(openai.NotFoundError):
            client.audio.transcriptions.create(model="nobody", file=("digits.wav", digits))


def test_triton_client_predicts_from_the_editors_features_and_it_is_published(demonstration):
    user = requests.recent_users(demonstration.home / "features" / "offline" / "editor_activity", 1)[0]
    address = demonstration.layout.serve.removeprefix("http://")
    client = tritonclient.http.InferenceServerClient(address)
    identity = f"e2e-{time.time_ns()}"
    headers = {"x-entity-id": user, "x-request-id": identity}
    result = client.infer("edits", [], headers=headers, request_id=identity)
    assert 0 <= result.as_numpy("probability")[0] <= 1
    stranger = client.infer("edits", [], headers={"x-entity-id": "nobody-has-seen-this-editor"})
    assert 0 <= stranger.as_numpy("probability")[0] <= 1
    client.close()

    consumer = KafkaConsumer(bootstrap_servers=demonstration.layout.kafka, auto_offset_reset="earliest")
    consumer.assign([TopicPartition("predictions", p) for p in consumer.partitions_for_topic("predictions")])
    found = []

    def published():
        for records in consumer.poll(timeout_ms=200).values():
            found.extend(prediction for record in records if (prediction := json.loads(record.value))["entity"] == user)
        return any(identity in str(prediction["id"]) for prediction in found)

    wait_for(published, "the prediction on its topic", 60)
    consumer.close()
    prediction = next(prediction for prediction in found if identity in str(prediction["id"]))
    assert prediction["model"] == "edits"
    assert any(value is not None for value in prediction["features"].values())


def test_metrics_count_the_requests(demonstration):
    text = httpx.get(f"{demonstration.layout.serve}/metrics", timeout=30).text
    assert "/v1/audio/transcriptions" in text
    assert "# TYPE" in text


def test_silence_is_an_answer_and_too_large_a_body_is_refused(demonstration):
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(8000, np.float32), 8000, format="WAV")
    with httpx.Client(base_url=demonstration.layout.serve, timeout=60) as client:
        quiet = client.post(
            "/v1/audio/transcriptions", data={"model": "whisper"}, files={"file": ("a.wav", silence.getvalue())}
        )
        assert quiet.status_code == 200, quiet.text
        large = client.post("/v2/models/edits/infer", content=b" " * (27 << 20))
        assert large.status_code == 413, large.text


def test_a_killed_stream_worker_comes_back_and_loses_nothing(demonstration):
    before = stream_rows(demonstration)
    for pid in {row["pid"] for row in before}:
        os.kill(pid, signal.SIGKILL)
    done = demonstration.shell("millrace simulate wikipedia --limit 500 --poison 0.1")
    assert done.returncode == 0, done.stderr
    sent = json.loads(done.stdout.splitlines()[-1])["messages"]

    def accounted(rows):
        return sum(row["processed"] + row["dead"] + row["late"] for row in rows)

    wait_for(
        lambda: accounted(stream_rows(demonstration)) >= accounted(before) + sent, "every event accounted for", 120
    )
    after = stream_rows(demonstration)
    assert accounted(after) == accounted(before) + sent
    assert sum(row["dead"] for row in after) > sum(row["dead"] for row in before)
    assert min(row["epoch"] for row in after) > max(row["epoch"] for row in before)


def test_down_ends_the_stack_and_no_other_broker(demonstration, tmp_path):
    port, controller = free_ports(2)
    other = Broker(tmp_path / "data", log=tmp_path / "kafka.log", port=port, controller_port=controller)
    other.start()
    try:
        done = subprocess.run(
            ["millrace", "down"], cwd=ROOT, env=demonstration.environ, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for(lambda: not processes_of(demonstration.home), "every process of the stack gone", 20)
        assert answers(other.bootstrap_servers)
    finally:
        other.stop()


def processes_of(home: Path) -> list[str]:
    """Processes whose environment names this home, but for this test's own."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                if f"MILLRACE_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100])
            except OSError:
                continue
    return found


def data() -> Path | None:
    folder = os.environ.get("MILLRACE_DATA")
    return Path(folder) if folder else None
