"""Check that the features of served predictions are those of the offline log, or of the kernel over the raw topic."""

import argparse
import sys
import time
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from ops.environment import Environment
from ops.jobs import JobError, add_repo, open_repo, parser, run
from streaming import events, history, skew
from streaming.checkpoint import filesystem
from streaming.plan import Plan
from streaming.views import LogPlace, log_place, plans


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_repo(options)
    options.add_argument("--view", help="stream feature view (default: all)")
    options.add_argument("--recompute", action="store_true", help="compute the features from the raw topic again")
    return options.parse_args()


def main() -> dict[str, object]:
    """Compare; the table by feature goes to standard error. A mismatch, or that nothing was checked, is an error."""
    args = arguments()
    environment = Environment.read()
    environment.export()
    store = open_repo(args.repo)
    views: dict[str, object] = {}
    failures, checked = [], 0
    for plan in plans(store, [args.view] if args.view else None, environment.kafka_bootstrap_servers):
        place = None if args.recompute else log_place(store, plan.view, environment.home)
        verdict, predictions, unreadable = _check(plan, place)
        print("\n".join([f"view {plan.view}", *verdict.table(), *verdict.examples]), file=sys.stderr)
        checked += verdict.checked
        known = f"the offline log {place.folder}" if place else f"the topic '{plan.topic}'"
        if failure := verdict.failure(predictions, known):
            failures.append(f"view '{plan.view}': {failure}")
        views[plan.view] = {
            "predictions": predictions,
            "unreadable": unreadable,
            "matched": verdict.matched.total(),
            "mismatches": verdict.mismatched.total(),
            "defaulted": verdict.defaulted.total(),
            "unknown": verdict.unknown.total(),
        }
    result = {"views": views, "recomputed": args.recompute}
    if failures:
        raise JobError(f"In {'; in '.join(failures)}: see the table above.", result)
    if not checked:
        topic, names = events.PREDICTIONS.name, ", ".join(views) or "any view: the repository has none"
        raise JobError(f"Nothing was checked: no prediction on topic '{topic}' read features of {names}.", result)
    return result


def _check(plan: Plan, place: LogPlace | None) -> tuple[skew.Verdict, int, int]:
    """What was found in a log (None: in the raw topic), over how many predictions, and how many could not be read."""
    verdict, names = skew.Verdict(), [aggregate.name for aggregate in plan.aggregates]
    integer_key = plan.entity_type == "int64"
    predictions, unreadable = _predictions(plan)
    found = (skew.read(event, plan.view, names, integer_key, verdict) for event in predictions)
    served = [each for each in found if each is not None]
    wanted = {(each.entity, each.time_us // skew.SECOND_US) for each in served}
    if place is None:
        batches = history.records(plan.bootstrap_servers, plan.topic, f"millrace-skew-{plan.view}")
        known = skew.recomputed(plan, batches, wanted, time.time_ns() // 1_000)
    else:
        rows = _log(place, plan, {entity for entity, _ in wanted})
        known = skew.logged(rows, plan.entity, place.event_timestamp, names) if rows is not None else {}
    skew.judge(served, known, names, verdict)
    return verdict, len(served), unreadable


def _predictions(plan: Plan) -> tuple[list[dict[str, Any]], int]:
    """The events of the topic that are JSON objects, and how many are not."""
    topic, found, unreadable = events.PREDICTIONS.name, [], 0
    for batch in history.records(plan.bootstrap_servers, topic, f"millrace-skew-{plan.view}"):
        for row in range(len(batch.offsets)):
            try:
                event = orjson.loads(batch.value(row) or b"")
            except orjson.JSONDecodeError:
                event = None
            if isinstance(event, dict):
                found.append(event)
            else:
                unreadable += 1
    return found, unreadable


def _log(place: LogPlace, plan: Plan, entities: set[str | int]) -> pa.Table | None:
    """The rows of some entities of an offline log; None where there are none."""
    filesystem_, folder = filesystem(place.folder)
    kind = pa.int64() if plan.entity_type == "int64" else pa.string()
    keys = pa.array(sorted(entities, key=str), kind)
    columns = [plan.entity, place.event_timestamp, *(aggregate.name for aggregate in plan.aggregates)]
    parts = []
    for info in filesystem_.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if info.base_name.endswith(".parquet"):
            part = pq.read_table(info.path, columns=columns, filesystem=filesystem_)
            parts.append(part.filter(pc.is_in(part.column(plan.entity), value_set=keys)))
    return pa.concat_tables(parts) if parts else None


if __name__ == "__main__":
    run(main)
