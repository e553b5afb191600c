"""Compute the stream feature views of a Feast repository from Kafka, until stopped or until caught up."""

import argparse
import logging
import signal
from pathlib import Path

from feast import FeatureStore

from ops.environment import Environment
from ops.jobs import JobError, parser, ray_session, run
from streaming.logs import log_to_stderr
from streaming.plan import plans
from streaming.supervisor import Supervisor


def arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument("--repo", type=Path, default=Path("feature_repo"), help="folder of a Feast repository")
    options.add_argument("--views", help="comma-separated stream feature views (default: all)")
    options.add_argument("--workers", type=int, default=1, help="actors that share the partitions (default 1)")
    options.add_argument("--until-caught-up", action="store_true", help="end when nothing is left to read")
    return options.parse_args()


def main() -> dict[str, object]:
    """Run the stream; SIGTERM (`ray job stop`) and SIGINT let it flush and end."""
    args = arguments()
    environment = Environment.read()
    environment.export()
    repo = args.repo.expanduser().absolute()
    if not (repo / "feature_store.yaml").is_file():
        raise JobError(f"There is no feature_store.yaml in {repo}: give --repo the folder of a Feast repository.")
    log_to_stderr()
    logging.getLogger("streaming").info("starting", extra={"repo": str(repo), "home": str(environment.home)})
    store = FeatureStore(repo_path=str(repo))
    views = [name.strip() for name in args.views.split(",") if name.strip()] if args.views else None
    supervisor = Supervisor(
        store,
        plans(store, views),
        home=environment.home,
        workers=args.workers,
        until_caught_up=args.until_caught_up,
        bootstrap_servers=environment.kafka_bootstrap_servers,
    )
    with ray_session():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: supervisor.stop())
        return {"views": supervisor.run()}


if __name__ == "__main__":
    run(main)
