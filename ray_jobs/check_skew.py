"""Check that the features of served predictions are those of the offline log, or of the kernel over the raw topic."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast import FeatureStore
from pyarrow import fs as pafs

from ops.environment import Environment
from ops.jobs import JobError, parser, run
from streaming import events, history, skew
from streaming.checkpoint import filesystem
from streaming.plan import Plan
from streaming.views import plans


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument("--repo", type=Path, default=Path("feature_repo"), help="folder of a Feast repository")
    options.add_argument("--view", help="stream feature view (default: all)")
    options.add_argument("--recompute", action="store_true", help="compute the features from the raw topic again")
    return options.parse_args()


def main() -> dict[str, object]:
    """Compare; the table by feature goes to standard error, and no mismatch is how it should be."""
    args = arguments()
    environment = Environment.read()
    environment.export()
    repo = args.repo.expanduser().absolute()
    if not (repo / "feature_store.yaml").is_file():
        raise JobError(f"There is no feature_store.yaml in {repo}: give --repo the folder of a Feast repository.")
    store = FeatureStore(repo_path=str(repo))
    result: dict[str, object] = {}
    for plan in plans(store, [args.view] if args.view else None):
        servers = environment.kafka_bootstrap_servers or plan.bootstrap_servers
        plan = dataclasses.replace(plan, bootstrap_servers=servers)
        verdict, predictions = _check(plan, store.get_stream_feature_view(plan.view).batch_source, args.recompute)
        print("\n".join([f"view {plan.view}", *verdict.table(), *verdict.examples]), file=sys.stderr)
        result[plan.view] = {
            "predictions": predictions,
            "matched": verdict.matched.total(),
            "mismatches": verdict.mismatched.total(),
            "defaulted": verdict.defaulted.total(),
            "unknown": verdict.unknown.total(),
        }
    return {"views": result, "recomputed": args.recompute}


def _check(plan: Plan, log: Any, recompute: bool) -> tuple[skew.Verdict, int]:
    verdict, names = skew.Verdict(), [aggregate.name for aggregate in plan.aggregates]
    integer_key = plan.entity_type == "int64"
    found = (skew.read(event, plan.view, names, integer_key, verdict) for event in _predictions(plan))
    served = [each for each in found if each is not None]
    wanted = {(each.entity, each.time_us // skew.SECOND_US) for each in served}
    if recompute:
        batches = history.records(plan.bootstrap_servers, plan.topic, f"millrace-skew-{plan.view}")
        known = skew.recomputed(plan, batches, wanted, time.time_ns() // 1_000)
    else:
        rows = _log(log.path, plan, log.timestamp_field, {entity for entity, _ in wanted})
        known = skew.logged(rows, plan.entity, log.timestamp_field, names) if rows is not None else {}
    skew.judge(served, known, names, verdict)
    return verdict, len(served)


def _predictions(plan: Plan) -> Iterator[dict[str, Any]]:
    topic = events.PREDICTIONS.name
    for batch in history.records(plan.bootstrap_servers, topic, f"millrace-skew-{plan.view}"):
        for row in range(len(batch.offsets)):
            try:
                event = orjson.loads(batch.value(row) or b"")
            except orjson.JSONDecodeError:
                continue
            if isinstance(event, dict):
                yield event


def _log(path: str, plan: Plan, timestamp: str, entities: set[str | int]) -> pa.Table | None:
    """The rows of some entities of an offline log, a folder or a glob over one; None where there are none."""
    filesystem_, folder = filesystem(path.rpartition("/")[0] if path.endswith(".parquet") else path)
    kind = pa.int64() if plan.entity_type == "int64" else pa.string()
    keys = pa.array(sorted(entities, key=str), kind)
    columns = [plan.entity, timestamp, *(aggregate.name for aggregate in plan.aggregates)]
    parts = []
    for info in filesystem_.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if info.base_name.endswith(".parquet"):
            part = pq.read_table(info.path, columns=columns, filesystem=filesystem_)
            parts.append(part.filter(pc.is_in(part.column(plan.entity), value_set=keys)))
    return pa.concat_tables(parts) if parts else None


if __name__ == "__main__":
    run(main)
