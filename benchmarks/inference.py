"""Transcriptions a second over HTTP, batched by availability against one at a time, on the same server and model.

The model has the size of configs/whisper/digits.yaml and was trained for a few steps, so that transcripts end as real
ones do.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.record import Figure, machine, write
from ops import requests
from ops.environment import Environment
from ops.jobs import ray_session
from ops.layout import REPOSITORY
from ops.ports import free_ports

CLIENTS = 16
SECONDS = 20.0
BATCH = 16
CONFIG = Path("configs/whisper/digits.yaml")
TRAINING = ["train.steps=400", "train.validate_every=400"]


def main() -> None:
    """Train, then serve the same version twice, once with batches and once without."""
    conditions = f"{CLIENTS} clients, {SECONDS:.0f} s each, {CONFIG}; {machine()}"
    with TemporaryDirectory(prefix="bench-") as folder:
        os.environ |= {"MILLRACE_HOME": folder}
        environment = Environment.read()
        environment.export()
        command = [sys.executable, "ray_jobs/train_whisper.py", "--config", str(CONFIG)]
        command += [word for setting in TRAINING for word in ("--set", setting)]
        trained = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
        wer = json.loads(trained.stdout.splitlines()[-1])["wer_after"]
        recordings = requests.utterances(REPOSITORY / CONFIG, environment.data, environment.home, 64)
        with ray_session():
            rates = {size: _serve(size, recordings) for size in (1, BATCH, 1, BATCH)}  # the second turn counts
    write(
        "inference",
        [
            Figure(
                name="transcriptions, batched",
                value=rates[BATCH],
                unit="requests/s",
                better="higher",
                conditions=f"{conditions}; WER of the model {wer:.3f}",
                peer="the same server with batches of one",
                peer_value=rates[1],
            )
        ],
    )


def _serve(batch: int, recordings: Sequence[bytes]) -> float:
    """Requests a second of one server, all clients always having one request under way."""
    from ray import serve

    from serving.app import build

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({"whisper": {"max_batch_size": batch, "max_queue": 128}}))
    address = f"http://127.0.0.1:{port}"
    with requests.Client(address) as client:
        client.wait_for("whisper")
        client.transcribe(recordings[:3])
    counts = [0] * CLIENTS
    ends = time.monotonic() + SECONDS

    def work(number: int) -> None:
        with httpx.Client(base_url=address, timeout=60.0) as http:
            while time.monotonic() < ends:
                wav = recordings[(number + counts[number] * CLIENTS) % len(recordings)]
                files = {"file": ("digits.wav", wav, "audio/wav")}
                http.post("/v1/audio/transcriptions", data={"model": "whisper"}, files=files).raise_for_status()
                counts[number] += 1

    clients = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for client_thread in clients:
        client_thread.start()
    for client_thread in clients:
        client_thread.join()
    serve.shutdown()
    return round(sum(counts) / SECONDS, 1)


if __name__ == "__main__":
    main()
