"""Feast's compute engine over our kernel: `feast materialize` computes windows from raw events.

In feature_store.yaml:

    batch_engine:
      type: streaming.compute_engine.MillraceComputeEngine
      offline_path: data/features    # where the rows of all windows go too, as Parquet; without it only online

A view with aggregations whose batch source holds raw events gets the final values of its windows: a row at each E
covers [E - window, E). The events of a materialization are read with what the windows reach back to, so that its first
rows are whole too, and sorted by time, so that none is late. Any other view, and a view whose batch source is the
offline log of its features, is materialized as Feast's own local engine does. What Feast 0.67 does not keep in its
registry cannot be materialized from there: the aggregations of a BatchFeatureView (a task with the view itself works)
and `offline` of a StreamFeatureView (`offline_path` decides).
"""

import dataclasses
import logging
import time
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FileSource, KafkaSource, StreamFeatureView
from feast.data_format import JsonFormat
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.common.retrieval_task import HistoricalRetrievalTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.repo_config import FeastConfigBaseModel
from feast.utils import _convert_arrow_to_proto

from streaming import arrow_columns
from streaming.backfill import Output, table
from streaming.checkpoint import filesystem, write_atomic
from streaming.partition import Partition
from streaming.plan import EntityType, Plan, PlanError
from streaming.transformations import Reader
from streaming.views import check_together, compile_view

log = logging.getLogger(__name__)

ROWS_A_CHUNK = 131_072
ROWS_A_WRITE = 50_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FAR_US = 1 << 60
WORDS: Mapping[str, str] = {
    "int8": "tinyint",
    "int16": "smallint",
    "int32": "int",
    "int64": "bigint",
    "uint8": "smallint",
    "uint16": "int",
    "uint32": "bigint",
    "uint64": "bigint",
    "float": "float",
    "double": "double",
    "bool": "boolean",
    "string": "string",
    "large_string": "string",
    "string_view": "string",
}


class EngineError(ValueError):
    """A materialization that cannot be done as declared, in one sentence."""


class MillraceComputeEngineConfig(FeastConfigBaseModel):
    """Settings under `batch_engine`; `offline_path` is a folder or URI, under which each view gets a folder."""

    type: Literal["streaming.compute_engine.MillraceComputeEngine"] = "streaming.compute_engine.MillraceComputeEngine"
    offline_path: str | None = None


class MillraceComputeEngine(LocalComputeEngine):
    """Materializes views with windowed aggregations by the kernel of the stream, in this process."""

    def __init__(self, *, offline_path: str | None = None, **options: Any) -> None:
        options.pop("type", None)
        super().__init__(**options)
        self._offline_path = offline_path

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **options: Any
    ) -> LocalMaterializationJob:
        view = task.feature_view
        job_id = f"{view.name}-{task.start_time}-{task.end_time}"
        try:
            if not _computed_from_events(view, self._source_columns(view)):
                return super()._materialize_one(registry, task, **options)
            if task.disable_event_timestamp:
                raise EngineError(
                    f"View '{view.name}' has windows: it cannot be materialized without event timestamps."
                )
            rows = self._rows(registry, task.project, view, _utc(task.start_time), _utc(task.end_time))
            if view.offline or self._offline_path is not None:
                self._write_offline(view, rows, task)
            if view.online:
                self._write_online(registry, task, rows)
            return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.SUCCEEDED)
        except Exception as error:
            return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.ERROR, error=error)

    def get_historical_features(self, registry: BaseRegistry, task: HistoricalRetrievalTask) -> Any:
        """The entity rows with the values of the newest window that had ended at each row's `event_timestamp`.

        Nulls where there is none within the view's ttl. Returns an Arrow table for a view that is computed from events.

        Raises:
            EngineError: The entity rows are no DataFrame with the join key and `event_timestamp`.
        """
        view: Any = task.feature_view
        if not _computed_from_events(view, self._source_columns(view)):
            return super().get_historical_features(registry, task)
        join_key = registry.get_entity(view.entities[0], task.project).join_key
        asked = task.entity_df
        if not isinstance(asked, pd.DataFrame) or not {join_key, "event_timestamp"} <= set(asked.columns):
            raise EngineError(
                f"View '{view.name}': give a DataFrame with the columns '{join_key}' and event_timestamp."
            )
        moments: Any = pd.to_datetime(asked["event_timestamp"], utc=True)
        left = asked.assign(event_timestamp=moments.astype("M8[us, UTC]"))
        ttl = view.ttl or None
        end = left["event_timestamp"].max().to_pydatetime()
        start = left["event_timestamp"].min().to_pydatetime() - ttl if ttl else EPOCH
        features = [field.name for field in view.features if field.name != join_key]
        right: Any = self._rows(registry, task.project, view, start, end).to_pandas()
        right = right.rename(columns={view.batch_source.timestamp_field: "event_timestamp"})
        right = right[[join_key, "event_timestamp", *features]].sort_values("event_timestamp")
        right[join_key] = right[join_key].astype(left[join_key].dtype)
        if task.full_feature_name:
            right = right.rename(columns={name: f"{view.name}__{name}" for name in features})
        order = left["event_timestamp"].reset_index(drop=True).sort_values(kind="stable").index
        joined = pd.merge_asof(
            left.iloc[order], right, on="event_timestamp", by=join_key, tolerance=pd.Timedelta(ttl) if ttl else None
        )
        joined.index = order
        return pa.Table.from_pandas(joined.sort_index(), preserve_index=False)

    def _source_columns(self, view: Any) -> dict[str, pa.DataType]:
        """The schema of a view's batch source; empty where the view has no aggregations to compute.

        Raises:
            EngineError: The view is a BatchFeatureView that lost its aggregations in the registry.
        """
        source = view.batch_source
        if source is None:
            return {}
        names = [name for name, _ in source.get_table_column_names_and_types(self.repo_config)]
        if not getattr(view, "aggregations", None):
            plain = not (getattr(view, "feature_transformation", None) or source.field_mapping)
            missing = [field.name for field in view.features if field.name not in names]
            if plain and missing:
                raise EngineError(
                    f"View '{view.name}' has no aggregations and its batch source no column '{missing[0]}'. Feast's"
                    " registry does not keep those of a BatchFeatureView: declare a StreamFeatureView, whose"
                    " batch_source holds the events."
                )
            return {}
        columns = [name for name in names if name != source.timestamp_field]
        nothing = self._pull(source, [], columns, EPOCH, EPOCH).to_arrow()
        return {field.name: field.type for field in nothing.schema if field.name in names}

    def _pull(self, source: Any, keys: list[str], columns: list[str], start: datetime, end: datetime) -> Any:
        return self.offline_store.pull_all_from_table_or_query(
            config=self.repo_config,
            data_source=source,
            join_key_columns=keys,
            feature_name_columns=columns,
            timestamp_field=source.timestamp_field,
            created_timestamp_column=None,
            start_date=start,
            end_date=end,
        )

    def _rows(self, registry: BaseRegistry, project: str, view: Any, start: datetime, end: datetime) -> pa.Table:
        """The final values of the windows that end in (start, end], with the columns of the batch source's log."""
        entity = registry.get_entity(view.entities[0], project)
        plan = _plan(view, entity.join_key, self._source_columns(view))
        source = Reader(plan).source
        columns = [name for name in arrow_columns.names(source) if name not in (plan.entity, plan.timestamp)]
        reach = _reach(plan)
        since = EPOCH if reach is None else max(EPOCH, start - reach)
        events = self._pull(view.batch_source, [plan.entity], columns, since, end).to_arrow()
        arrow_columns.check_schema(source, events.schema, f"The batch source of view '{view.name}'")
        output = Output("", plan.timestamp, view.batch_source.created_timestamp_column or None, time.time_ns() // 1_000)
        whole = _computed(plan, events.sort_by(plan.timestamp), _us(end), output)
        ends = whole.column(plan.timestamp)
        after = pc.greater(ends, pa.scalar(start, ends.type))
        return whole.filter(pc.and_(after, pc.less_equal(ends, pa.scalar(end, ends.type))))

    def _write_online(self, registry: BaseRegistry, task: MaterializationTask, rows: pa.Table) -> None:
        """The newest row of each entity."""
        view = task.feature_view
        entity = registry.get_entity(view.entities[0], task.project)
        frame = rows.select([entity.join_key]).to_pandas()
        newest = rows.take(pa.array(frame.index[~frame.duplicated(keep="last")])).combine_chunks()
        progress = task.tqdm_builder(newest.num_rows) if task.tqdm_builder else None
        for first in range(0, newest.num_rows, ROWS_A_WRITE):
            part = newest.slice(first, ROWS_A_WRITE).combine_chunks()
            protos = _convert_arrow_to_proto(part, view, {entity.join_key: entity.value_type})
            done = progress.update if progress is not None else None
            self.online_store.online_write_batch(self.repo_config, view, protos, done or (lambda _: None))
        if progress is not None:
            progress.close()

    def _write_offline(self, view: Any, rows: pa.Table, task: MaterializationTask) -> None:
        """One Parquet part, which a second materialization of the same interval replaces."""
        if self._offline_path is None:
            raise EngineError(
                f"View '{view.name}' has offline=True and its batch source holds raw events, which features must not be"
                " mixed with: set batch_engine.offline_path to a folder for the features."
            )
        base = self._offline_path
        relative = "://" not in base and not base.startswith("/") and self.repo_config.repo_path
        filesystem_, folder = filesystem(f"{self.repo_config.repo_path}/{base}" if relative else base)
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink)
        filesystem_.create_dir(f"{folder}/{view.name}", recursive=True)
        name = f"{view.name}-{_us(_utc(task.start_time))}-{_us(_utc(task.end_time))}.parquet"
        write_atomic(filesystem_, f"{folder}/{view.name}/{name}", memoryview(sink.getvalue()))


def _computed(plan: Plan, events: pa.Table, end_us: int, output: Output) -> pa.Table:
    """All rows that the events give until the watermark stands at `end_us`, by rising time for each entity."""
    partition, reader = Partition(plan, 0), Reader(plan)
    tables = [table(plan, partition.emit(), output)]
    first = 0
    for batch in events.to_batches(ROWS_A_CHUNK):
        offsets = pa.array(range(first, first + batch.num_rows), pa.int64()).to_numpy()
        columns, rejects = reader.convert(batch, 0, offsets)
        if rejects:
            log.warning("events that cannot be read", extra={"count": len(rejects), "reason": rejects[0].reason})
        for _ in partition.add(columns, offsets, 0):
            partition.mark()
        tables.append(table(plan, partition.take(), output))
        partition.shrink()
        first += batch.num_rows
    partition.tick(end_us - partition.clock_us)
    tables.append(table(plan, partition.emit(), output))
    return pa.concat_tables(tables)


def _computed_from_events(view: Any, source: Mapping[str, pa.DataType]) -> bool:
    """Whether the view has aggregations and its batch source is not the log of their results."""
    declared = {aggregation.resolved_name(aggregation.time_window) for aggregation in getattr(view, "aggregations", [])}
    return bool(declared) and not declared <= set(source)


def _plan(view: Any, join_key: str, source: Mapping[str, pa.DataType]) -> Plan:
    """The plan of a view over its batch source: final values, no disorder.

    Raises:
        PlanError: What cannot be computed.
    """
    if join_key not in source:
        raise PlanError(f"View '{view.name}': its batch source has no column '{join_key}': it has {', '.join(source)}.")
    timestamp = view.batch_source.timestamp_field
    fields = []
    for name, found in source.items():
        word = "timestamp" if name == timestamp else "double" if "decimal" in str(found) else WORDS.get(str(found))
        if word is not None and "`" not in name:
            fields.append(f"`{name}` {word}")
    events = KafkaSource(
        name=f"{view.name}_events",
        timestamp_field=timestamp,
        message_format=JsonFormat(schema_json=", ".join(fields)),
        topic="batch",
        kafka_bootstrap_servers="",
        watermark_delay_threshold=timedelta(),
        batch_source=FileSource(path="batch", timestamp_field=timestamp),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        stream = StreamFeatureView(
            name=view.name,
            source=events,
            entities=[],
            schema=view.schema,
            tags=view.tags,
            aggregations=view.aggregations,
            timestamp_field=timestamp,
            udf=getattr(view, "udf", None),
            enable_tiling=getattr(view, "enable_tiling", False),
            tiling_hop_size=getattr(view, "tiling_hop_size", None),
        )
    key_type: EntityType = "int64" if pa.types.is_integer(source[join_key]) else "string"
    plan = compile_view(stream, join_key, key_type)
    if plan.models:
        raise PlanError(
            f"View '{view.name}' has models, which follow the events of a partition in the order of their offsets; a"
            " batch source has none: compute it by ray_jobs/backfill_features.py over the topic."
        )
    plan = dataclasses.replace(
        plan, emission="final", delay_us=0, lateness_us=0, clocks="partition", idle_ttl_us=0, future_us=FAR_US
    )
    check_together(f"View '{view.name}'", plan)
    return plan


def _reach(plan: Plan) -> timedelta | None:
    """How far the windows reach back; None for windows that may reach back to the beginning."""
    if any(aggregate.kind != "sliding" for aggregate in plan.aggregates):
        return None
    return timedelta(microseconds=max(aggregate.window_us for aggregate in plan.aggregates))


def _utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)
