"""What every script in ray_jobs/ shares: arguments, a Ray session, one JSON line or one clear error at the end."""

import argparse
import json
import logging
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ops.layout import REPOSITORY

if TYPE_CHECKING:
    from feast import FeatureStore

RAY_TRIES = 4
INTERRUPTED = 130
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    "RAY_worker_niceness": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
}
"""What Ray must know before it starts.

To notice soon that a training worker is dead or hangs, and to start another; not to put every other process of the
machine before stream workers and replicas, as its own niceness of 15 does: training takes that for itself; and to let
a job end soon after Ray's head has died, which on one machine never comes back.
"""
ALONE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""What else a Ray of one process must know: no cloud takes its only node away, so nothing needs to watch for that."""


class JobError(Exception):
    """A job that can't be done as asked, in one sentence.

    Args:
        message: The sentence.
        result: Of a job that was done and found what must not be: it is still printed.
    """

    def __init__(self, message: str, result: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.result = result


def parser(description: str, config: str | None = None) -> argparse.ArgumentParser:
    """The parser of a job; with a default configuration it takes `--config` and repeated `--set KEY=VALUE`."""
    arguments = argparse.ArgumentParser(description=description)
    if config is not None:
        arguments.add_argument("--config", type=Path, default=Path(config), help=f"YAML file (default {config})")
        arguments.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override one value"
        )
    return arguments


def add_repo(arguments: argparse.ArgumentParser) -> None:
    """Give a job `--repo`, the Feast repository that it reads."""
    arguments.add_argument(
        "--repo", type=Path, default=REPOSITORY / "feature_repo", help="folder of a Feast repository (default: ours)"
    )


def open_repo(folder: Path) -> "FeatureStore":
    """The Feast store that a repository declares.

    Raises:
        JobError: there is no repository.
    """
    from feast import FeatureStore

    folder = folder.expanduser().absolute()
    if not (folder / "feature_store.yaml").is_file():
        raise JobError(f"There is no feature_store.yaml in {folder}: give --repo the folder of a Feast repository.")
    return FeatureStore(repo_path=str(folder))


@contextmanager
def ray_session() -> Iterator[None]:
    """Join the cluster that runs this job or, outside of one, start a Ray on this machine for as long as it takes.

    A submitted job finds the cluster's address in RAY_ADDRESS; an activated shell has the dashboard's there instead.
    A local Ray gets a token of its own, since Ray listens on all interfaces, and at least four logical CPUs, so that
    small actors fit beside two training workers on a machine with two cores.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    inside_cluster = bool(address) and not address.startswith("http")
    if not inside_cluster:
        start_ray(num_cpus=max(4, os.cpu_count() or 1))

    import ray

    if inside_cluster:
        ray.init(log_to_driver=True)
    try:
        yield
    finally:
        ray.shutdown()


def own_ray() -> None:
    """Prepare the environment for a Ray that this process starts for itself alone, before Ray is imported."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_TOKEN"] = _token()
    for name, value in (ALONE | RAY_SETTINGS).items():
        os.environ.setdefault(name, value)


@cache
def _token() -> str:
    """Of every Ray that this process starts for itself: Ray reads the token once a process."""
    return secrets.token_hex(32)


def start_ray(num_cpus: int, folder: str | None = None) -> None:
    """Start a Ray for this process alone; a busy machine gets several tries, since Ray gives its node 30 s and no more.

    Raises:
        JobError: it did not start in RAY_TRIES tries.
    """
    own_ray()

    import ray

    for attempt in range(1, RAY_TRIES + 1):
        try:
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=folder)
            return
        except Exception as error:
            ray.shutdown()
            if type(error) is not Exception or attempt == RAY_TRIES:  # what Ray raises when its node is not there yet
                raise JobError(f"Ray did not start on this machine in {attempt} tries: {error}") from error
            logging.getLogger(__name__).warning("Ray did not start in time on this busy machine, trying again")


def run(main: Callable[[], Mapping[str, object]]) -> NoReturn:
    """Run a job: its result as one JSON line, or its user's error as one line on standard error and exit code 2.

    A user's error is a JobError, or a ValueError that our own code raised; anything else keeps its traceback. The
    result that a JobError holds is printed too. A job that is interrupted ends with one line and exit code 130.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    logging.getLogger("kafka").setLevel(logging.WARNING)  # a dozen lines a connection otherwise
    try:
        result = main()
    except (JobError, ValueError) as error:
        if not (isinstance(error, JobError) or _is_ours(error)):
            raise
        if isinstance(error, JobError) and error.result is not None:
            print(json.dumps(error.result, default=str), flush=True)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt as interruption:
        print(f"stopped: {interruption or 'interrupted'}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    print(json.dumps(result, default=str), flush=True)
    sys.exit(0)


def _is_ours(error: Exception) -> bool:
    """Whether the statement that raised stands in this repository and not in a library."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(REPOSITORY) and "site-packages" not in raised_in.parts
