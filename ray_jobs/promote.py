"""Make a registered model the champion if it passes the gate: `promote.py --config FILE`, or `--roll-back`."""

import argparse
from dataclasses import asdict
from typing import Any

from evaluation.statistics import Resampling
from models import tasks
from models.registry import CHALLENGER, CHAMPION, Registry
from ops.configuration import load
from ops.environment import Environment
from ops.jobs import JobError, parser, run
from ops.promotion import Decision, Gate, decide


def main() -> dict[str, object]:
    """Score candidate and champion on the configuration's test split, decide, set the aliases."""
    arguments = _arguments()
    environment = Environment.read()
    environment.export()
    kind = tasks.named(arguments.config.absolute().parent.name)
    config: Any = load(kind.config, arguments.config, arguments.overrides)
    name, registry = config.registered_name, Registry(environment.tracking_uri)
    if arguments.roll_back:
        version = registry.roll_back(name, arguments.reason or "rolled back by hand")
        return {"model": name, "promoted": True, "version": version}
    candidate = registry.resolve(name, arguments.candidate)
    gate = _gate(arguments, kind)
    if (name, CHAMPION) not in registry.aliases():
        registry.promote(name, candidate.version, "the first champion")
        return {"model": name, "promoted": True, "version": candidate.version, "reason": "the first champion"}
    champion = registry.resolve(name, CHAMPION)
    if champion.version == candidate.version:
        raise JobError(f"{name}@{arguments.candidate} is the champion already, version {champion.version}.")
    found = kind.data(config, environment.data, environment.home)
    split_hash = kind.split_hash(found)
    if candidate.split_hash != split_hash:
        raise JobError(
            f"{name} version {candidate.version} was trained beside the test split {candidate.split_hash}, and the "
            f"configuration has {split_hash}; give the configuration and data that it was trained with."
        )
    cache = environment.home / "models"
    own = kind.scores(found, registry.download(candidate, cache))
    if unknown := sorted(gate.guards.keys() - own.keys()):
        raise JobError(f"--guard {unknown[0]}: there is no such metric on this split; known: {', '.join(own)}.")
    other = kind.scores(found, registry.download(champion, cache))
    decision: Decision = decide(gate, own, other, kind.metrics, kind.units(found))
    reason = f"{decision.reason}, version {candidate.version} against {champion.version}"
    if champion.split_hash != split_hash:
        reason += f", which was trained beside another test split ({champion.split_hash}) and may know these samples"
    if decision.promoted:
        registry.promote(name, candidate.version, arguments.reason or reason)
    versions = {"version": candidate.version, "champion": champion.version}
    return {"model": name, **versions, **asdict(decision), "reason": reason}


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__ or "", config="configs/whisper/digits.yaml")
    arguments.add_argument(
        "--candidate", default=CHALLENGER, help="alias or number of the version to promote (default %(default)s)"
    )
    arguments.add_argument(
        "--minimum-gain", type=float, default=0.0, help="of the primary metric (default %(default)s)"
    )
    arguments.add_argument(
        "--guard",
        action="append",
        default=[],
        metavar="METRIC=LOSS",
        help="how much worse it may be there, or on a part of the split: wer/general=0.01",
    )
    arguments.add_argument("--level", type=float, default=0.95, help="of the paired interval (default %(default)s)")
    arguments.add_argument("--roll-back", action="store_true", help="make the previous champion the champion again")
    arguments.add_argument("--reason", help="kept with the alias instead of the figures")
    return arguments.parse_args()


def _gate(arguments: argparse.Namespace, kind: tasks.Kind) -> Gate:
    guards: dict[str, float] = {}
    for guard in arguments.guard:
        name, _, allowed = guard.partition("=")
        if name.partition("/")[0] not in kind.metrics:
            raise JobError(f"--guard {guard}: there is no metric {name}; known: {', '.join(kind.metrics)}.")
        try:
            guards[name] = float(allowed)
        except ValueError:
            raise JobError(f"--guard {guard}: give it as {name}=0.01, how much worse it may be.") from None
    metric, higher_is_better = next(iter(kind.metrics.items()))
    return Gate(metric, higher_is_better, arguments.minimum_gain, guards, Resampling(level=arguments.level))


if __name__ == "__main__":
    run(main)
