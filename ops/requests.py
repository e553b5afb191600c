"""What a client of the served models sees: requests one after another, and how long each takes."""

import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from ops.configuration import load

TRANSCRIPTIONS = 40
EDITS = 200
READY_S = 180.0

Item = TypeVar("Item")


class RequestError(ValueError):
    """A request that was not answered as it should be, in one sentence."""


@dataclass(frozen=True)
class Latency:
    """Percentiles over sequential requests, seen by the client."""

    p50_ms: float
    p95_ms: float
    requests: int


class Client:
    """A client of one Serve application."""

    def __init__(self, address: str, api_keys: Sequence[str] = ()) -> None:
        headers = {"authorization": f"Bearer {api_keys[0]}"} if api_keys else {}
        self._client = httpx.Client(base_url=address, headers=headers, timeout=60.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def wait_for(self, *names: str) -> None:
        """Wait until all these models are served.

        Raises:
            RequestError: one is not there after READY_S.
        """
        deadline = time.monotonic() + READY_S
        while True:
            listed = self._answer(self._client.get("/v1/models")).json()["data"]
            missing = set(names) - {model["id"] for model in listed}
            if not missing:
                return
            if time.monotonic() > deadline:
                raise RequestError(
                    f"{', '.join(sorted(missing))} is not served after {READY_S:.0f} s; see the Serve log."
                )
            time.sleep(0.5)

    def transcribe(self, recordings: Iterable[bytes]) -> Latency:
        """Send each WAV file to the model `whisper`, one after the other; the first is a warm-up."""
        return self._timed(
            recordings,
            lambda wav: self._client.post(
                "/v1/audio/transcriptions", data={"model": "whisper"}, files={"file": ("digits.wav", wav, "audio/wav")}
            ),
        )

    def infer(self, users: Iterable[str]) -> Latency:
        """Ask the model `edits` about each user, one after the other; the first is a warm-up."""
        return self._timed(
            users,
            lambda user: self._client.post(
                "/v2/models/edits/infer", json={"inputs": []}, headers={"x-entity-id": user}
            ),
        )

    def _timed(self, items: Iterable[Item], send: Callable[[Item], httpx.Response]) -> Latency:
        seconds = []
        for item in items:
            began = time.perf_counter()
            self._answer(send(item))
            seconds.append(time.perf_counter() - began)
        return _percentiles(seconds[1:])

    def _answer(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            raise RequestError(f"{response.request.url} answered {response.status_code}: {response.text[:300]}")
        return response


def recent_users(log: Path, count: int) -> list[str]:
    """The users of the newest rows of the features' log, newest first."""
    table = pq.read_table(log, columns=["user", "event_timestamp"]).sort_by([("event_timestamp", "descending")])
    return list(dict.fromkeys(table["user"].to_pylist()))[:count]


def utterances(config: Path, data: Path | None, home: Path, count: int) -> list[bytes]:
    """The first utterances of a speech configuration's test split, as WAV files."""
    import soundfile

    from models.whisper.config import WhisperConfig
    from models.whisper.data import splits

    settings = load(WhisperConfig, config)
    files = []
    for utterance in splits(settings.data, data, home).test[:count]:
        file = io.BytesIO()
        soundfile.write(file, utterance.wave, settings.data.sample_rate_hz, format="WAV")
        files.append(file.getvalue())
    return files


def _percentiles(seconds: Sequence[float]) -> Latency:
    measured: npt.NDArray[np.float64] = np.asarray(seconds) * 1000
    p50, p95 = np.percentile(measured, [50, 95])
    return Latency(round(float(p50), 1), round(float(p95), 1), len(measured))
