"""How long an event takes from its producer to the online store, seen by a reader of that store."""

import json
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

PROBES_PER_S = 20
FEATURE = "editor_activity:count_added_10m_by_1m"
BACKGROUND_USERS = 2_000


class FreshnessError(ValueError):
    """A probe that never arrived, in one sentence."""


@dataclass(frozen=True)
class Freshness:
    """Percentiles over the probes; the reader polls, so a figure holds up to one read (a few ms) too much."""

    p50_ms: float
    p99_ms: float
    probes: int
    events_per_s: float


class _Probes:
    """Users that appear once each: sent at a known moment, waited for until the store knows them."""

    def __init__(self) -> None:
        self._run = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._sent: dict[str, float] = {}
        self._count = 0
        self.latencies_s: list[float] = []

    def send(self) -> str:
        with self._lock:
            user = f"freshness-{self._run}-{self._count}"
            self._count += 1
            self._sent[user] = time.monotonic()
        return user

    def outstanding(self) -> list[str]:
        with self._lock:
            return list(self._sent)

    def arrived(self, user: str, at: float) -> None:
        with self._lock:
            self.latencies_s.append(at - self._sent.pop(user))


def measure(
    bootstrap_servers: str, repository: Path, start: datetime, rate_hz: float, seconds: float, topic: str = "edits"
) -> Freshness:
    """Send events at a rate, one in some a probe, while a reader asks the online store for the probes.

    Args:
        bootstrap_servers: the broker of the stream.
        repository: folder of the Feast repository that holds `editor_activity`.
        start: event time of the first event; later ones follow by the clock on the wall, so that a replayed stream
            stays in its own time.
        rate_hz: events a second.
        seconds: how long events are sent.
        topic: where to.

    Raises:
        FreshnessError: probes that the store did not show within 30 s.
    """
    from feast import FeatureStore

    probes = _Probes()
    store = FeatureStore(repo_path=str(repository))
    sender = threading.Thread(target=_send, args=(bootstrap_servers, topic, start, rate_hz, seconds, probes))
    began = time.monotonic()
    sender.start()
    deadline = began + seconds + 30
    while sender.is_alive() or probes.outstanding():
        if time.monotonic() > deadline:
            lost = len(probes.outstanding())
            raise FreshnessError(f"{lost} probes did not reach the online store in 30 s: is the stream worker running?")
        users = probes.outstanding()
        if users:
            rows = [{"user": user} for user in users]
            counts = store.get_online_features(features=[FEATURE], entity_rows=rows).to_dict()
            seen = time.monotonic()
            for user, count in zip(users, counts[FEATURE.partition(":")[2]], strict=True):
                if count:
                    probes.arrived(user, seen)
        time.sleep(0.002)
    sender.join()
    latencies_ms = np.asarray(probes.latencies_s) * 1000
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    return Freshness(round(float(p50), 1), round(float(p99), 1), len(latencies_ms), rate_hz)


def _send(bootstrap_servers: str, topic: str, start: datetime, rate_hz: float, seconds: float, probes: _Probes) -> None:
    from kafka import KafkaProducer

    producer = KafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=2)
    total, probe_every = int(rate_hz * seconds), max(1, round(rate_hz / PROBES_PER_S))
    began = time.monotonic()
    for index in range(total):
        due = index / rate_hz
        ahead = due - (time.monotonic() - began)
        if ahead > 0.001:
            time.sleep(ahead)
        user = probes.send() if index % probe_every == 0 else f"editor-{index % BACKGROUND_USERS}"
        event = {
            "time": (start + timedelta(seconds=due)).astimezone(UTC).isoformat(timespec="milliseconds"),
            "user": user,
            "added": index % 100,
            "deleted": 0,
            "isRobot": False,
        }
        producer.send(topic, key=user.encode(), value=json.dumps(event).encode())
    producer.flush()
    producer.close()
