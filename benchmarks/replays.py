"""Real events replayed through a real broker and a worker, and the features that it logged checked against pandas.

The Wikipedia edits and the series of the Numenta Anomaly Benchmark where MILLRACE_DATA holds them, else generated ones
of the same schema. What is compared are rows of the offline log, drawn at random: each must be what pandas computes
from the entity's events up to its moment.
"""

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import orjson
import pandas as pd
import pyarrow.dataset as ds
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.stream_feature_view import StreamFeatureView
from feast.types import Float64, Int64, String

from benchmarks.record import Figure, machine, write
from ops import simulate
from ops.broker import Broker
from ops.environment import Environment
from ops.ports import free_ports
from streaming import history
from streaming.events import EDITS, MEASUREMENTS, Topic
from streaming.opening import Settings, checkpoint_uri, open_worker
from streaming.plan import Aggregate, Plan
from streaming.topics import ensure_topics
from streaming.views import plans

ROWS = 3_000
EXACT = ("count", "sum", "mean", "std", "min", "max", "first", "last")
QUANTILES = ("p50", "p95")
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@dataclass(frozen=True)
class Replay:
    """A simulated stream, the column whose windows are computed, and the windows: suffix to (length, slide)."""

    stream: str
    topic: Topic
    column: str
    windows: Mapping[str, tuple[timedelta, timedelta]]


@dataclass
class Agreement:
    """How far features were from what pandas computes: the greatest differences that were found."""

    rows: int = 0
    relative: dict[str, float] = field(default_factory=lambda: dict.fromkeys(EXACT, 0.0))
    rank: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUANTILES, 0.0))


REPLAYS = (
    Replay("wikipedia", EDITS, "added", {"10m": (10 * MINUTE, MINUTE), "1h": (HOUR, HOUR)}),
    Replay("nab", MEASUREMENTS, "value", {"1h": (HOUR, 5 * MINUTE), "1d": (24 * HOUR, HOUR)}),
)


def main() -> None:
    """Replay both."""
    conditions, environment, figures = machine(), Environment.read(), []
    for replay in REPLAYS:
        with TemporaryDirectory(prefix="replay-") as folder:
            counts, rate, agreement = run(replay, Path(folder), environment, ROWS)
        at = f"{replay.stream}: {counts}; {agreement.rows:,} rows of the log against pandas; {conditions}"
        figures.append(Figure(f"{replay.stream} into features", rate, "events/s", "higher", at))
        exact, rank = max(agreement.relative.values()), max(agreement.rank.values())
        figures.append(Figure(f"{replay.stream}, {' '.join(EXACT)}", exact, "rel. diff.", "lower", at, target=1e-9))
        figures.append(Figure(f"{replay.stream}, {' '.join(QUANTILES)}", rank, "rank error", "lower", at, target=0.03))
    write("replays", figures)


def run(
    replay: Replay, folder: Path, environment: Environment, rows: int, limit: int | None = None
) -> tuple[str, float, Agreement]:
    """Send the stream, compute its features until caught up, compare; the counts, events a second, the agreement."""
    ports = free_ports(2)
    broker = Broker(folder / "kafka", log=folder / "kafka.log", port=ports[0], controller_port=ports[1])
    broker.start()
    try:
        servers = broker.bootstrap_servers
        limited = [] if limit is None else ["--limit", str(limit)]
        if simulate.main([replay.stream, "--bootstrap-servers", servers, *limited], environment):
            raise RuntimeError(f"The simulation of {replay.stream} failed.")
        store = repository(replay, folder, servers)
        (plan,) = plans(store)
        rejects = {f"{plan.topic}.{kind}": 1 for kind in ("dead", "late")}
        partitions = ensure_topics(servers, {plan.topic: replay.topic.partitions, **rejects})[plan.topic]
        settings = Settings(str(folder), checkpoint_uri(folder), flush_s=0.05, until_caught_up=True)
        epochs = dict.fromkeys(range(partitions), 1)
        worker = open_worker(store, plan, partitions > 1, settings)
        started_s = time.perf_counter()
        worker.start(epochs)
        worker.run(threading.Event(), until_caught_up=True)
        seconds = time.perf_counter() - started_s
        done = worker.status().values()
        worker.close()
        counts = {name: sum(figures[name] for figures in done) for name in ("processed", "dead", "late", "keys")}
        events = _events(servers, replay)
        if sum(counts[name] for name in ("processed", "dead", "late")) != len(events):
            raise RuntimeError(f"{len(events)} events were sent, and {counts} of them are accounted for.")
    finally:
        broker.stop()
    agreement = compare(plan, events, folder / "log", rows)
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return told, round(len(events) / seconds), agreement


def repository(replay: Replay, folder: Path, servers: str) -> FeatureStore:
    """A Feast repository with one view of the stream."""
    (folder / "repo").mkdir()
    (folder / "repo" / "feature_store.yaml").write_text(
        f"project: replay\nprovider: local\nregistry: {folder}/registry.db\nonline_store:\n"
        f"  type: streaming.sinks.GuardedSqliteOnlineStore\n  path: {folder}/online.db\n"
        "offline_store:\n  type: duckdb\nentity_key_serialization_version: 3\n"
    )
    key = replay.topic.key
    log = FileSource(
        path=f"{folder}/log/*.parquet",
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created_timestamp",
    )
    source = KafkaSource(
        name=replay.topic.name,
        topic=replay.topic.name,
        kafka_bootstrap_servers=servers,
        message_format=JsonFormat(schema_json=replay.topic.schema),
        timestamp_field=replay.topic.timestamp,
        watermark_delay_threshold=5 * MINUTE,
        batch_source=log,
    )
    aggregations = [
        Aggregation(
            name=f"{function}_{name}",
            column=replay.column,
            function=function,
            time_window=length,
            slide_interval=slide,
        )
        for name, (length, slide) in replay.windows.items()
        for function in (*EXACT, *QUANTILES)
    ]
    types = [(one.name, Int64 if one.function == "count" else Float64) for one in aggregations]
    view = StreamFeatureView(
        name="replayed",
        entities=[entity := Entity(name="entity", join_keys=[key], value_type=ValueType.STRING)],
        source=source,
        timestamp_field=replay.topic.timestamp,
        aggregations=aggregations,
        schema=[Field(name=key, dtype=String), *(Field(name=name, dtype=kind) for name, kind in types)],
    )
    store = FeatureStore(repo_path=str(folder / "repo"))
    store.apply([entity, view])
    return store


def compare(plan: Plan, events: pd.DataFrame, log: Path, rows: int) -> Agreement:
    """Compare rows of the log, drawn at random, with pandas over the events: entity, time_us and value, by time."""
    table = ds.dataset(log).to_table().to_pandas()
    table["time_us"] = table["event_timestamp"].dt.as_unit("us").astype("int64")
    table = table.sort_values("created_timestamp", kind="stable").drop_duplicates([plan.entity, "time_us"], keep="last")
    drawn = table.sample(min(rows, len(table)), random_state=0)
    history_of = {entity: found for entity, found in events.groupby("entity", sort=False)}
    agreement = Agreement(rows=len(drawn))
    for row in drawn.to_dict("records"):
        own = history_of[row[plan.entity]]
        for aggregate in plan.aggregates:
            end_us = row["time_us"] // aggregate.slide_us * aggregate.slide_us + aggregate.slide_us
            times = own["time_us"].to_numpy()
            first = np.searchsorted(times, end_us - aggregate.window_us)
            last = np.searchsorted(times, min(end_us - 1, row["time_us"]), side="right")
            _judge(agreement, aggregate, row[aggregate.name], own["value"].iloc[first:last].dropna())
    return agreement


def _judge(agreement: Agreement, aggregate: Aggregate, found: float | None, values: "pd.Series[float]") -> None:
    function = aggregate.function
    if aggregate.quantile is not None:
        if len(values):
            error = _rank_error(np.asarray(values, dtype=np.float64), float(found or 0.0), aggregate.quantile)
            agreement.rank[function] = max(agreement.rank[function], error)
        return
    if function in ("first", "last"):
        expected = (values.iloc[0 if function == "first" else -1]) if len(values) else np.nan
    else:
        expected = getattr(values, function)()
    if pd.isna(expected) or found is None or pd.isna(found):
        same = pd.isna(expected) and (found is None or pd.isna(found))
        difference = 0.0 if same else math.inf
    else:
        difference = abs(float(found) - float(expected)) / max(abs(float(expected)), 1e-12)
    agreement.relative[function] = max(agreement.relative[function], difference)


def _rank_error(values: npt.NDArray[np.float64], found: float, quantile: float) -> float:
    """By how much of all ranks a value lies beside the quantile; half a rank is nothing."""
    ordered, count = np.sort(values), len(values)
    low, high = np.searchsorted(ordered, found, "left"), np.searchsorted(ordered, found, "right")
    wanted = quantile * (count - 1)
    return float(max(0.0, low - 1 - wanted, wanted - high) / count)


def _events(servers: str, replay: Replay) -> pd.DataFrame:
    """What lies in the topic: entity, event time and value of every event, in order of time."""
    topic, found = replay.topic, []
    for batch in history.records(servers, topic.name, "replay"):
        for row in range(len(batch.offsets)):
            event = orjson.loads(batch.value(row) or b"")
            found.append((event[topic.key], event[topic.timestamp], event[replay.column]))
    frame = pd.DataFrame(found, columns=["entity", "time", "value"])
    frame["value"] = pd.to_numeric(frame["value"]).astype(float)
    times = pd.to_datetime(frame.pop("time"), utc=True, format="ISO8601")
    frame["time_us"] = times.dt.as_unit("us").astype("int64")
    return frame.sort_values("time_us", kind="stable")


if __name__ == "__main__":
    main()
