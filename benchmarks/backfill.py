"""Backfill from Parquet to Parquet: events a second, beside Feast's Ray engine and polars on the same windows.

polars runs in an environment of its own that is made for the run; Feast's engine, which holds a row for every entity
and hop in pandas, gets the beginning of the same events.
"""

import argparse
import json
import subprocess
import sys
import time
import venv
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import Figure, machine, write
from ops.jobs import ray_session
from streaming.backfill import Output, prepare, run_on_ray
from streaming.history import pieces
from streaming.plan import Aggregate, Column, Plan

EVENTS, USERS, HOURS = 10_000_000, 10_000, 24
FEAST_EVENTS = 100_000
WORKERS = 2
WINDOW, SLIDE = timedelta(hours=1), timedelta(minutes=5)
FUNCTIONS = ("count", "sum", "mean")
START = datetime(2024, 5, 1, tzinfo=UTC)
POLARS = "polars==2.1.0"
POLARS_CODE = """
import sys, time
import polars as pl
source, sink = sys.argv[1:]
started = time.perf_counter()
added = pl.col("added")
windows = pl.read_parquet(source, columns=["user", "time", "added"]).group_by_dynamic(
    "time", every="5m", period="1h", offset="-55m", closed="left", label="right", group_by="user"
).agg(added.count().alias("count"), added.sum().alias("sum"), added.mean().alias("mean"))
windows.write_parquet(sink)
print(windows.height, time.perf_counter() - started)
"""


def main() -> None:
    """Measure one after the other, each reading and writing files."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--feast", help=argparse.SUPPRESS)
    feast = options.parse_args().feast
    if feast:
        print(json.dumps(_feast(Path(feast))))
        return
    conditions = machine()
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        _make(folder / "events.parquet")
        rows, seconds = _ours(folder)
        polars_rows, polars_s = _polars(folder)
        printed = subprocess.check_output([sys.executable, "-m", "benchmarks.backfill", "--feast", name], text=True)
        feast_s = float(printed.splitlines()[-1])
    what = (
        f"{EVENTS:,} events of {USERS:,} users in {HOURS} h, Parquet to Parquet; count, sum and mean of one column,"
        f" 1 h by 5 min; {WORKERS} workers, {rows:,} rows"
    )
    figures = [
        Figure(
            "backfill against Feast's Ray engine",
            round(EVENTS / seconds),
            "events/s",
            "higher",
            f"{what}; Feast on the first {FEAST_EVENTS:,} events; {conditions}",
            target=round(20 * FEAST_EVENTS / feast_s),
            peer="Feast 0.67 ray.engine, tiling",
            peer_value=round(FEAST_EVENTS / feast_s, 1),
        ),
        Figure(
            "backfill against polars",
            round(EVENTS / seconds),
            "events/s",
            "higher",
            f"{what}, polars {polars_rows:,} rows; {conditions}",
            target=round(EVENTS / polars_s),
            peer=f"{POLARS} group_by_dynamic",
            peer_value=round(EVENTS / polars_s),
        ),
    ]
    write("backfill", figures)


def _make(path: Path) -> None:
    """Events in the order of their time, as a log has them."""
    random = np.random.default_rng(0)
    times = np.sort(random.integers(0, HOURS * 3_600_000_000, EVENTS)) + int(START.timestamp()) * 1_000_000
    users = pa.array([f"user{number:05d}" for number in range(USERS)])
    table = pa.table(
        {
            "time": pa.array(times, pa.timestamp("us", "UTC")),
            "user": users.take(pa.array(random.integers(0, USERS, EVENTS))),
            "added": random.integers(0, 1_000, EVENTS),
        }
    )
    pq.write_table(table, path, row_group_size=1_000_000)
    pq.write_table(table.slice(0, FEAST_EVENTS), path.with_name("first.parquet"))


def _ours(folder: Path) -> tuple[int, float]:
    microsecond = timedelta(microseconds=1)
    aggregates = tuple(
        Aggregate(function, "added", function, WINDOW // microsecond, SLIDE // microsecond)  # type: ignore[arg-type]
        for function in FUNCTIONS
    )
    column = Column("added", "bigint", nullable=True)
    plan = Plan("bench", "", "", "user", "string", "time", (column,), aggregates, 0)
    with ray_session():
        best = float("inf")
        for attempt in range(2):  # the first one compiles what `make setup` did not
            output = Output(str(folder / f"ours{attempt}"), "event_timestamp", "created", time.time_ns() // 1_000)
            prepare(output)
            done, seconds = run_on_ray(plan, pieces(plan, str(folder / "events.parquet")), output, WORKERS)
            best = min(best, seconds)
    return done.rows, best


def _polars(folder: Path) -> tuple[int, float]:
    environment = folder / "polars"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", POLARS], check=True)
    best = float("inf")
    for _ in range(2):
        command = [str(python), "-c", POLARS_CODE, str(folder / "events.parquet"), str(folder / "polars.parquet")]
        rows, seconds = subprocess.check_output(command, text=True).split()
        best = min(best, float(seconds))
    return int(rows), best


def _feast(folder: Path) -> float:
    """Seconds that Feast's Ray engine takes, from the file to the table of the newest windows."""
    import pandas as pd
    from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
    from feast.aggregation import Aggregation
    from feast.data_format import JsonFormat
    from feast.infra.common.retrieval_task import HistoricalRetrievalTask
    from feast.stream_feature_view import StreamFeatureView
    from feast.types import Float64, String

    repository = folder / "feast"
    repository.mkdir()
    (repository / "feature_store.yaml").write_text(
        "project: bench\nprovider: local\nregistry: registry.db\nonline_store:\n  type: sqlite\n  path: online.db\n"
        "offline_store:\n  type: duckdb\nbatch_engine:\n  type: ray.engine\nentity_key_serialization_version: 3\n"
    )
    user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
    source = KafkaSource(
        name="events",
        topic="events",
        kafka_bootstrap_servers="",
        message_format=JsonFormat(schema_json="time timestamp, user string, added bigint"),
        timestamp_field="time",
        batch_source=FileSource(path=str(folder / "first.parquet"), timestamp_field="time"),
    )
    view = StreamFeatureView(
        name="bench",
        entities=[user],
        source=source,
        timestamp_field="time",
        schema=[Field(name="user", dtype=String), *(Field(name=name, dtype=Float64) for name in FUNCTIONS)],
        aggregations=[Aggregation("added", name, WINDOW, None, name) for name in FUNCTIONS],
        enable_tiling=True,
        tiling_hop_size=SLIDE,
    )
    store: Any = FeatureStore(repo_path=str(repository))
    store.apply([user, view])
    end = START + timedelta(hours=HOURS)
    users = pd.DataFrame({"user": ["user00000"], "event_timestamp": [end]})
    engine = store._get_provider().batch_engine  # starts a Ray of its own
    task = HistoricalRetrievalTask("bench", users, view, False, store.registry, START, end)
    started_s = time.perf_counter()
    engine.get_historical_features(store.registry, task).to_df()
    return time.perf_counter() - started_s


if __name__ == "__main__":
    main()
