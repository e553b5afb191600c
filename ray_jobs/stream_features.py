"""Compute the stream feature views of a Feast repository, and the derived topics that they read, from Kafka."""

import argparse
import logging
import signal

from ops.environment import Environment
from ops.jobs import JobError, add_repo, open_repo, parser, ray_session, run
from streaming.allowance import share_bytes
from streaming.logs import log_to_stderr
from streaming.report import scale
from streaming.supervisor import Supervisor
from streaming.views import derivations, plans
from streaming.worker import FLUSH_S


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    add_repo(options)
    options.add_argument("--views", help="comma-separated stream feature views (default: all)")
    options.add_argument("--workers", type=int, default=1, help="actors that share the partitions (default 1)")
    options.add_argument(
        "--scale",
        type=int,
        metavar="N",
        help="let the running stream, with --views the one that computes them, go on with N workers, and end",
    )
    options.add_argument(
        "--assignment",
        choices=["static", "group"],
        default="static",
        help="who deals the partitions: this job, or a Kafka consumer group that other jobs may join (default static)",
    )
    options.add_argument(
        "--flush-ms",
        type=float,
        default=1000 * FLUSH_S,
        help="pause between writes to the online store while a worker keeps up (default %(default)g)",
    )
    options.add_argument(
        "--max-state-mb",
        type=int,
        help="memory that the states of one worker may take together; more ends the stream (default: half of this"
        " machine's, shared among the workers)",
    )
    options.add_argument(
        "--checkpoints",
        metavar="URI",
        help="folder of the checkpoints: an absolute path or file://, s3://, gs:// (default: one under MILLRACE_HOME)",
    )
    options.add_argument(
        "--reset",
        action="append",
        default=[],
        metavar="VIEW",
        help="set the checkpoints of a view or derived topic aside and start it from the earliest offset; repeatable",
    )
    options.add_argument("--until-caught-up", action="store_true", help="end when nothing is left to read")
    return options.parse_args()


def main() -> dict[str, object]:
    """Run the stream; SIGTERM (`ray job stop`) and SIGINT let it flush and end."""
    args = arguments()
    environment = Environment.read()
    environment.export()
    views = [name.strip() for name in args.views.split(",") if name.strip()] if args.views else None
    if args.scale is not None:
        if args.scale < 1:
            raise JobError(f"A stream needs at least one worker, not {args.scale}.")
        return {"workers": args.scale, "job": scale(environment.home / "stream", args.scale, views)}
    if args.flush_ms < 0:
        raise JobError(f"--flush-ms must not be below 0: it is {args.flush_ms:g}.")
    if args.max_state_mb is not None and args.max_state_mb < 1:
        raise JobError(f"--max-state-mb must be at least 1: it is {args.max_state_mb}.")
    max_state_bytes = share_bytes(max(1, args.workers)) if args.max_state_mb is None else args.max_state_mb << 20
    store = open_repo(args.repo)
    log_to_stderr()
    logging.getLogger("streaming").info("starting", extra={"repo": str(store.repo_path), "home": str(environment.home)})
    servers = environment.kafka_bootstrap_servers
    compiled = plans(store, views, servers)
    supervisor = Supervisor(
        store,
        [*derivations(store, [plan.view for plan in compiled], servers), *compiled],
        home=environment.home,
        checkpoints=args.checkpoints,
        reset=args.reset,
        workers=args.workers,
        until_caught_up=args.until_caught_up,
        flush_s=args.flush_ms / 1000,
        max_state_bytes=max_state_bytes,
        by_group=args.assignment == "group",
    )
    with ray_session():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.stop())
        return {"views": supervisor.run()}


if __name__ == "__main__":
    run(main)
