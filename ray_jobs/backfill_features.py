"""Compute a stream feature view over recorded events, Parquet, JSON lines or a topic, as the stream would have."""

import argparse
import time

from ops.environment import Environment
from ops.jobs import JobError, add_repo, open_repo, parser, ray_session, run
from streaming import backfill, history
from streaming.allowance import share_bytes
from streaming.views import plans


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_repo(options)
    options.add_argument("--view", required=True, help="stream feature view")
    options.add_argument(
        "--input", required=True, help=".parquet, .jsonl or .jsonl.gz file, a folder of them, or kafka:TOPIC"
    )
    options.add_argument("--output", required=True, help="empty folder for the Parquet parts, or a URI")
    options.add_argument("--workers", type=int, default=1, help="actors that share the entities (default 1)")
    return options.parse_args()


def main() -> dict[str, object]:
    """Backfill one view; rejects go to rejects.jsonl in the output's folder."""
    args = arguments()
    environment = Environment.read()
    environment.export()
    if args.workers < 1:
        raise JobError(f"--workers is {args.workers}: a backfill needs at least one.")
    store = open_repo(args.repo)
    (plan,) = plans(store, [args.view], environment.kafka_bootstrap_servers)
    log = store.get_stream_feature_view(args.view).batch_source
    output = backfill.Output(
        args.output,
        log.timestamp_field if log else "event_timestamp",
        (log and log.created_timestamp_column) or "created_timestamp",
        time.time_ns() // 1_000,
    )
    backfill.prepare(output)
    with ray_session():
        done, seconds = backfill.run_on_ray(
            plan,
            history.pieces(plan, args.input),
            output,
            args.workers,
            max_state_bytes=share_bytes(args.workers),
        )
    return {
        "view": plan.view,
        "rows": done.rows,
        "events": done.events,
        "rejects": {"dead": done.dead, "late": done.late},
        "keys": done.keys,
        "seconds": round(seconds, 3),
        "events_per_s": round(done.events / max(seconds, 1e-9)),
        "output": args.output,
    }


if __name__ == "__main__":
    run(main)
