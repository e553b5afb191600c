"""What the workers of one process tell Prometheus: built when it is asked for, from figures that the loops keep.

Distributions are filled from arrays, because an object a record would cost more than computing the features. The
registry is our own: importing Feast may switch the default one to multiprocess mode.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from wsgiref.simple_server import WSGIServer

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streaming.records import Floats, RecordBatch

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
MILLISECONDS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_500.0, 5_000.0, 10_000.0, 30_000.0)
SAMPLED = 64

#: Name, kind, key of the partition's status, what it says.
FIGURES = (
    ("lag_records", "gauge", "lag", "Records of the topic that wait to be processed"),
    ("event_time_lag_seconds", "gauge", "event_lag_s", "Wall clock less the event time that the partition has reached"),
    ("watermark_seconds", "gauge", "watermark_s", "Event time below which no event is expected, seconds since 1970"),
    ("processed", "counter", "processed", "Records that changed a feature"),
    ("late", "counter", "late", "Records that came after their windows had closed"),
    ("dead", "counter", "dead", "Records that could not be read or computed"),
    ("derived", "counter", "derived", "Records of a derived topic that were committed"),
    ("lost", "counter", "lost", "Records that retention removed before they were read"),
    ("keys", "gauge", "keys", "Entities in the state"),
    ("panes", "gauge", "panes", "Panes, sessions and last events that are kept"),
    ("drifts", "counter", "drifts", "Events at which a model has detected drift"),
    ("state_bytes", "gauge", "state_bytes", "Memory held by the state"),
    ("checkpoint_age_seconds", "gauge", "checkpoint_age_s", "Time since the state was last saved or had not changed"),
    ("checkpoint_bytes", "gauge", "checkpoint_bytes", "Size of the last checkpoint file"),
    ("epoch", "gauge", "epoch", "How often the partition was taken over"),
)


class Distribution:
    """Counts of values in buckets.

    Args:
        bounds: Upper ends of the buckets, rising; one more without an end follows.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, values: Floats) -> None:
        """Count some values."""
        self._counts += np.bincount(np.searchsorted(self._bounds, values), minlength=len(self._counts))
        self._sum += float(values.sum())

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper end, as Prometheus wants them, and the sum of all values."""
        names = [*map(str, self._bounds.tolist()), "+Inf"]
        return list(zip(names, np.cumsum(self._counts).astype(float).tolist(), strict=True)), self._sum


class Measures:
    """The distributions of one worker."""

    def __init__(self) -> None:
        self.flush_ms = Distribution(MILLISECONDS)
        self.checkpoint_s = Distribution(SECONDS)
        self.freshness_s = Distribution(SECONDS)
        self._unflushed: list[Any] = []

    def read(self, batch: RecordBatch) -> None:
        """Remember when some of the records (64 of a batch at most) were produced."""
        self._unflushed.append(batch.timestamps_ms[:: 1 + len(batch.timestamps_ms) // SAMPLED])

    def flushed(self, seconds: float, now_us: int) -> None:
        """A flush has ended: what was read before it can be read by everybody now."""
        self.flush_ms.add(np.array([1000 * seconds]))
        if self._unflushed:
            self.freshness_s.add(np.maximum(now_us / 1e6 - np.concatenate(self._unflushed) / 1e3, 0.0))
            self._unflushed = []

    def saved(self, seconds: float) -> None:
        """The slow half of a checkpoint has ended."""
        self.checkpoint_s.add(np.array([seconds]))


class StreamMetrics(Collector):
    """The metrics `millrace_stream_*` of some workers, labelled by view and partition.

    Args:
        status: View to partition to figures, as `Worker.status` gives them.
        measures: View to distributions.
    """

    def __init__(
        self,
        status: Callable[[], Mapping[str, Mapping[int, Mapping[str, Any]]]],
        measures: Callable[[], Mapping[str, Measures]],
    ) -> None:
        self._status, self._measures = status, measures

    def collect(self) -> Iterator[Metric]:
        """Everything as it is now."""
        status = self._status()
        for name, kind, key, help_text in FIGURES:
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            metric = family(f"millrace_stream_{name}", help_text, labels=["view", "partition"])
            for view, partitions in status.items():
                for number, figures in partitions.items():
                    if figures.get(key) is not None:
                        metric.add_metric([view, str(number)], figures[key])
            yield metric
        for name, key, help_text in (
            ("flush_milliseconds", "flush_ms", "Writing rejects and the newest values to the online store"),
            ("checkpoint_seconds", "checkpoint_s", "Writing offline parts and state, beside the loop"),
            ("freshness_seconds", "freshness_s", "From the timestamp of a record to its value in the online store"),
        ):
            histogram = HistogramMetricFamily(f"millrace_stream_{name}", help_text, labels=["view"])
            for view, measures in self._measures().items():
                histogram.add_metric([view], *getattr(measures, key).buckets())
            yield histogram


def serve(metrics: StreamMetrics, host: str) -> tuple[str, Callable[[], None]]:
    """Answer `GET /metrics` on a free port; returns `host:port` and what ends it.

    Raises:
        OSError: the host is no address of this machine.
    """
    registry = CollectorRegistry()
    registry.register(metrics)
    server: WSGIServer
    thread: threading.Thread
    server, thread = start_http_server(0, addr=host, registry=registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"{host}:{server.server_port}", stop
