"""Training rows for a tabular model: entity, time and label from a topic's history, features as of then from Feast.

The features of a row are those that the stream worker had emitted for the entity a short delay after the event, found
by Feast's point-in-time join, so training sees what serving would have seen. Rows are split by entity: nobody whose
events are trained on is tested on.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from hashlib import blake2b

import numpy as np
import orjson
import pandas as pd
from feast import FeatureStore, FileSource, KafkaSource
from feast.errors import FeastObjectNotFoundException
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError
from numpy.typing import NDArray

from models.tabular.config import DataConfig

SPLITS = ("train", "validation", "test")
CONNECT_S = 10.0
POLL_S = 10.0


class DataError(ValueError):
    """Rows that can't be made or trained on, in one sentence."""


@dataclass(frozen=True)
class Stream:
    """Where a feature service's events come from."""

    topic: str
    bootstrap_servers: str
    entity: str
    """Name of the event's field that is the join key."""
    timestamp: str
    features: tuple[str, ...]
    """Names of the service's features, as a look-up returns them."""
    offline_logs: tuple[str, ...]
    """Globs of the Parquet files that hold the history of the features."""


@dataclass(frozen=True)
class Examples:
    """Rows of one split."""

    inputs: NDArray[np.float64]
    """[rows, features], NaN where missing."""
    labels: NDArray[np.bool_]
    entities: tuple[str, ...]


@dataclass(frozen=True)
class Splits:
    """All rows, split by entity; `hash` is that of the rows with their features."""

    train: Examples
    validation: Examples
    test: Examples
    features: tuple[str, ...]
    hash: str


def stream(store: FeatureStore, feature_service: str) -> Stream:
    """Find the one stream behind a feature service.

    Raises:
        DataError: no such service, or it does not read exactly one stream feature view.
    """
    try:
        projections = store.get_feature_service(feature_service).feature_view_projections
    except FeastObjectNotFoundException:
        known = ", ".join(sorted(service.name for service in store.list_feature_services())) or "none"
        raise DataError(f"Feature service {feature_service} is not applied; applied are: {known}.") from None
    views = {view.name: view for view in store.list_stream_feature_views()}
    if len(projections) != 1 or projections[0].name not in views:
        names = ", ".join(projection.name for projection in projections)
        raise DataError(f"Feature service {feature_service} reads {names}: it must read one stream feature view.")
    view = views[projections[0].name]
    source = view.stream_source
    if not isinstance(source, KafkaSource):
        raise DataError(f"Stream feature view {view.name} has no Kafka source to take labelled events from.")
    logs = (view.batch_source.path,) if isinstance(view.batch_source, FileSource) else ()
    return Stream(
        topic=source.kafka_options.topic,
        bootstrap_servers=source.kafka_options.kafka_bootstrap_servers,
        entity=view.join_keys[0],
        timestamp=view.timestamp_field,
        features=tuple(feature.name for feature in projections[0].features),
        offline_logs=logs,
    )


def history(bootstrap_servers: str, topic: str) -> Iterator[bytes]:
    """Yield the values of a topic from its beginning to the end it has now, partition by partition, in offset order.

    Raises:
        DataError: no broker answers there, the topic does not exist or holds nothing, or reading stalls.
    """
    empty = True
    try:
        consumer = KafkaConsumer(
            bootstrap_servers=bootstrap_servers,
            enable_auto_commit=False,
            max_poll_records=10_000,
            bootstrap_timeout_ms=int(CONNECT_S * 1000),
        )
        try:
            for number in sorted(consumer.partitions_for_topic(topic) or ()):
                for value in _partition_history(consumer, TopicPartition(topic, number)):
                    empty = False
                    yield value
        finally:
            consumer.close()
    except (KafkaError, OSError) as error:
        raise DataError(
            f"Kafka at {bootstrap_servers} does not answer ({type(error).__name__}): start it with `millrace up`."
        ) from None
    if empty:
        raise DataError(f"Topic {topic} holds no events: run `millrace simulate wikipedia` first.")


def _partition_history(consumer: KafkaConsumer, partition: TopicPartition) -> Iterator[bytes]:
    consumer.assign([partition])
    consumer.seek_to_beginning(partition)
    end = consumer.end_offsets([partition])[partition]
    while (position := consumer.position(partition)) < end:
        records = consumer.poll(timeout_ms=int(POLL_S * 1000)).get(partition, [])
        if not records and consumer.position(partition) == position:
            raise DataError(f"Topic {partition.topic} stalls at offset {position} of partition {partition.partition}.")
        yield from (record.value for record in records if record.value is not None and record.offset < end)


def entity_rows(values: Iterable[bytes], entity: str, timestamp: str, config: DataConfig) -> pd.DataFrame:
    """Make one row an event with the columns entity, `event_timestamp` (UTC) and the boolean label, in time order.

    The timestamp is that of the event plus the configured delay: the moment at which a prediction would be asked for.
    A value that is no event with these three fields is left out, as the stream worker leaves it out; repeated events
    of an entity at the same time count once. Sampling is by hash, so equal histories give equal rows.

    Raises:
        DataError: fewer than 100 rows are left.
    """
    found: dict[tuple[str, str], bool] = {}
    for value in values:
        try:
            fields = orjson.loads(value)
            key, moment, label = fields[entity], fields[timestamp], fields[config.label]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, str) and isinstance(moment, str) and isinstance(label, bool):
            found.setdefault((key, moment), label)
    rows = pd.DataFrame(
        {entity: [key for key, _ in found], "event_timestamp": [moment for _, moment in found]}
        | {config.label: list(found.values())}
    )
    rows["event_timestamp"] = pd.to_datetime(rows["event_timestamp"], utc=True, format="ISO8601", errors="coerce")
    rows = rows[rows["event_timestamp"].between(pd.Timestamp(0, tz="UTC"), pd.Timestamp.now(tz="UTC"))]
    rows = rows.drop_duplicates([entity, "event_timestamp"])
    names = rows[entity].astype(str) + "@" + rows["event_timestamp"].astype(str)
    lot = [_lot(name, config.seed) for name in names]
    rows = rows.assign(lot=lot).sort_values("lot")
    rows = rows.groupby(entity, sort=False).head(config.max_rows_per_entity).head(config.max_rows)
    if len(rows) < 100:
        raise DataError(
            f"Only {len(rows)} events hold {entity}, {timestamp} and {config.label}: at least 100 are needed."
        )
    rows = rows.assign(event_timestamp=rows["event_timestamp"] + pd.Timedelta(seconds=config.delay_s))
    return rows.drop(columns="lot").sort_values(["event_timestamp", entity], ignore_index=True)


def with_features(store: FeatureStore, rows: pd.DataFrame, config: DataConfig, source: Stream) -> pd.DataFrame:
    """Join each row with the features its entity had at its time; a feature not known then is NaN.

    Raises:
        DataError: the stream worker has not written any features yet, or none is as old as the rows.
    """
    for pattern in source.offline_logs:
        if not glob(pattern):
            raise DataError(
                f"No features are logged at {pattern}: run ray_jobs/stream_features.py --until-caught-up first."
            )
    joined = store.get_historical_features(
        entity_df=rows, features=store.get_feature_service(config.feature_service)
    ).to_df()
    names = list(source.features)
    joined[names] = joined[names].astype(np.float64)
    if joined[names].isna().all(axis=None):
        raise DataError(f"None of the {len(rows)} events has features at its time: run the stream worker over them.")
    return joined.sort_values(["event_timestamp", source.entity], ignore_index=True)


def split(rows: pd.DataFrame, entity: str, features: Sequence[str], config: DataConfig) -> Splits:
    """Split rows by a hash of their entity.

    Raises:
        DataError: a split has no rows, or rows of one class only.
    """
    lots = rows[entity].map({key: _lot(key, config.seed) for key in rows[entity].unique()})
    held_out = config.test_share + config.validation_share
    parts = {
        "test": lots < config.test_share,
        "validation": (lots >= config.test_share) & (lots < held_out),
        "train": lots >= held_out,
    }
    examples = {}
    for name, members in parts.items():
        labels = rows.loc[members, config.label].to_numpy(np.bool_)
        if labels.all() or not labels.any():
            raise DataError(
                f"The {name} split has {len(labels)} rows, {int(labels.sum())} of them with {config.label}: "
                "both classes are needed, so stream more events or raise data.max_rows."
            )
        examples[name] = Examples(
            inputs=rows.loc[members, list(features)].to_numpy(np.float64),
            labels=labels,
            entities=tuple(rows.loc[members, entity]),
        )
    content = pd.util.hash_pandas_object(rows[[entity, "event_timestamp", config.label, *features]], index=False)
    digest = blake2b(content.to_numpy().tobytes(), digest_size=8).hexdigest()
    return Splits(**examples, features=tuple(features), hash=digest)


def load(store: FeatureStore, config: DataConfig, bootstrap_servers: str | None = None) -> Splits:
    """Read the history, join the features and split: everything between the topic and the arrays.

    Raises:
        DataError: any of the reasons above.
    """
    source = stream(store, config.feature_service)
    values = history(bootstrap_servers or source.bootstrap_servers, source.topic)
    rows = entity_rows(values, source.entity, source.timestamp, config)
    return split(with_features(store, rows, config, source), source.entity, source.features, config)


def _lot(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed only."""
    digest = blake2b(key.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64
