"""The stream processor has Feast's own signatures, and refuses in a sentence what it cannot ingest."""

import ast
import inspect
import subprocess
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import pytest
from feast import Entity, FeatureStore, Field, FileSource, KafkaSource, ValueType
from feast.aggregation import Aggregation
from feast.data_format import JsonFormat, ParquetFormat
from feast.data_source import PushMode
from feast.stream_feature_view import StreamFeatureView
from feast.types import Int64, String

from streaming.derived import rekeyed
from streaming.plan import PlanError
from streaming.stream_processor import MillraceStreamProcessor

USER = Entity(name="person", join_keys=["user"], value_type=ValueType.STRING)
LOG = FileSource(name="log", path="log/*.parquet", file_format=ParquetFormat(), timestamp_field="event_timestamp")
EDITS = KafkaSource(
    name="edits",
    topic="edits",
    kafka_bootstrap_servers="nowhere:9092",
    message_format=JsonFormat(schema_json="time timestamp, user string, added bigint"),
    timestamp_field="time",
    watermark_delay_threshold=timedelta(minutes=1),
    batch_source=LOG,
)


def feasts_module() -> ast.Module:
    """The module of Feast's abstract class, read and not imported."""
    spec = find_spec("feast.infra.contrib.stream_processor")
    assert spec and spec.origin
    return ast.parse(Path(spec.origin).read_text())


def view(source: KafkaSource = EDITS, function: str = "count", online: bool = True) -> StreamFeatureView:
    return StreamFeatureView(
        name="activity",
        entities=[USER],
        source=source,
        timestamp_field="time",
        online=online,
        aggregations=[Aggregation(column="added", function=function, time_window=timedelta(hours=1), name="edits")],
        schema=[Field(name="user", dtype=String), Field(name="edits", dtype=Int64)],
    )


def applied(folder: Path, declared: StreamFeatureView) -> FeatureStore:
    (folder / "feature_store.yaml").write_text(
        "project: face\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        "online_store: {type: sqlite, path: online.db}\noffline_store: {type: duckdb}\n"
    )
    store = FeatureStore(repo_path=str(folder))
    store.apply([USER, declared])
    return store


def test_the_public_methods_have_the_signatures_of_feasts_abstract_class():
    (feasts,) = [
        node for node in feasts_module().body if isinstance(node, ast.ClassDef) and node.name == "StreamProcessor"
    ]
    methods = {node.name: node.args for node in feasts.body if isinstance(node, ast.FunctionDef)}
    public = {name: arguments for name, arguments in methods.items() if not name.startswith("_")}
    assert public.keys() == {"ingest_stream_feature_view"}
    for name, arguments in public.items():
        ours = inspect.signature(getattr(MillraceStreamProcessor, name)).parameters.values()
        assert [each.name for each in ours] == [each.arg for each in arguments.args]
        defaults = [str(each.default) for each in ours if each.default is not each.empty]
        assert defaults == [ast.unparse(each) for each in arguments.defaults]
    first = [each.arg for each in methods["__init__"].args][:3]
    assert list(inspect.signature(MillraceStreamProcessor.__init__).parameters)[:3] == first
    attributes = {node.target.id for node in feasts.body if isinstance(node, ast.AnnAssign)}
    assert attributes == inspect.get_annotations(MillraceStreamProcessor).keys()


def test_feasts_abstract_class_still_needs_pyspark():
    imported = [node.module for node in feasts_module().body if isinstance(node, ast.ImportFrom)]
    assert "pyspark.sql" in imported, "MillraceStreamProcessor can be a subclass now"


def test_a_view_that_was_applied_is_taken_as_it_is_declared(tmp_path):
    store = applied(tmp_path, view())
    for sfv in (view(), store.get_stream_feature_view("activity")):
        processor = MillraceStreamProcessor(store, sfv, tmp_path)
        assert (processor.fs, processor.sfv, processor.data_source) == (store, sfv, EDITS)


def test_a_view_that_was_applied_otherwise_or_not_at_all_is_refused(tmp_path):
    store = applied(tmp_path, view())
    with pytest.raises(PlanError, match="not declared as the registry has it: run `feast apply`"):
        MillraceStreamProcessor(store, view(function="nunique"), tmp_path)
    store.delete_feature_view("activity")
    with pytest.raises(PlanError, match="no stream feature view 'activity'"):
        MillraceStreamProcessor(store, view(), tmp_path)


def test_a_view_of_a_derived_topic_is_left_to_the_job(tmp_path):
    declared = view(source=rekeyed("by_user", EDITS, key="user", batch_source=LOG))
    store = applied(tmp_path, declared)
    with pytest.raises(PlanError, match="derived topic 'by_user', which the stream job computes"):
        MillraceStreamProcessor(store, declared, tmp_path)


@pytest.mark.parametrize("to", [PushMode.ONLINE, PushMode.ONLINE_AND_OFFLINE])
def test_a_view_that_is_not_online_is_not_ingested_there(tmp_path, to):
    store = applied(tmp_path, view(online=False))
    processor = MillraceStreamProcessor(store, store.get_stream_feature_view("activity"), tmp_path)
    with pytest.raises(PlanError, match="online=False"):
        processor.ingest_stream_feature_view(to)


def test_it_is_imported_without_ray():
    code = "import sys, streaming.stream_processor; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
