"""`millrace demo`: the whole way of the data once, by the commands that a user would type."""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ops import freshness, requests
from ops.environment import Environment
from ops.layout import REPOSITORY, Layout, Ports, binaries_folder
from ops.ports import free_ports, is_free
from streaming.report import read_views

STEP_LIMIT_S = 1200.0
CAUGHT_UP_S = 300.0
FRESHNESS_RATE_HZ = 2000.0
FRESHNESS_S = 5.0
WHISPER = "configs/whisper/digits.yaml"


class DemoError(Exception):
    """A step that did not end well, in one sentence with the end of its log."""


@dataclass(frozen=True)
class Shell:
    """Runs a user's commands in the repository, as they would be typed there."""

    environment: Mapping[str, str]
    logs: Path

    def run(self, name: str, command: str, activated: bool = True) -> dict[str, Any]:
        """Run one command to its end; its last line of JSON is the result, all that it prints is in its log.

        Raises:
            DemoError: the command failed, or did not end in STEP_LIMIT_S.
        """
        log = self.logs / f"demo-{name}.log"
        script = f'eval "$(millrace env)" && {command}' if activated else command
        path = f"{binaries_folder()}{os.pathsep}{self.environment.get('PATH', os.defpath)}"
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    ["bash", "-c", script],
                    cwd=REPOSITORY,
                    env={**self.environment, "PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=STEP_LIMIT_S,
                )
            except subprocess.TimeoutExpired:
                raise DemoError(f"`{command}` did not end in {STEP_LIMIT_S:.0f} s; its log is {log}.") from None
        lines = log.read_text(errors="replace").splitlines()
        if done.returncode:
            tail = "\n".join(lines[-25:])
            raise DemoError(f"`{command}` failed with exit code {done.returncode}; the end of {log}:\n{tail}")
        results = [line for line in lines if line.startswith("{") and line.endswith("}")]
        return dict(json.loads(results[-1])) if results else {}


class Narrator:
    """Numbered lines on standard output, and the same figures for the record."""

    def __init__(self, steps: int) -> None:
        self._steps, self._number = steps, 0
        self._began = time.monotonic()
        self.figures: dict[str, object] = {}

    def tell(self, text: str, **figures: object) -> None:
        """Say one step's line, with the seconds since the demonstration began."""
        self._number += 1
        self.figures |= figures
        print(f"[{self._number}/{self._steps}] {text} ({self.seconds:.0f} s)", flush=True)

    @property
    def seconds(self) -> float:
        """Seconds since the demonstration began."""
        return time.monotonic() - self._began


def main(argv: list[str], environment: Environment) -> int:
    """Bring the stack up in a home of its own, run each part once, and take it down again."""
    parser = argparse.ArgumentParser(prog="millrace demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the stack up at the end and print its addresses")
    arguments = parser.parse_args(argv)
    home = environment.home / "demo"
    if (home / "stack.json").exists():
        _shell(home).run("down", "millrace down", activated=False)
    shutil.rmtree(home, ignore_errors=True)  # a replay of the same day into old state would be all late
    (home / "logs").mkdir(parents=True)
    shell, narrator = _shell(home), Narrator(steps=7)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ended_well = False
    try:
        _demonstrate(shell, narrator, replace(environment, home=home))
        ended_well = True
    except DemoError as error:
        print(f"millrace demo: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if not (ended_well and arguments.keep):
            shell.run("down", "millrace down", activated=False)
    record = home / "reports" / "demo.json"
    record.write_text(json.dumps(narrator.figures | {"seconds": round(narrator.seconds, 1)}, indent=2) + "\n")
    print(f"figures: {record}\nreport:  {narrator.figures['report']}", flush=True)
    if arguments.keep:
        layout = Layout.current(replace(environment, home=home))
        print(f"served models {layout.serve}/docs, MLflow {layout.mlflow}, Ray {layout.dashboard}; in a shell:")
        print(
            f'  export MILLRACE_HOME={shlex.quote(str(home))}; eval "$({binaries_folder()}/millrace env)"', flush=True
        )
    return 0


def _shell(home: Path) -> Shell:
    return Shell({**os.environ, "MILLRACE_HOME": str(home)}, home / "logs")


def _demonstrate(shell: Shell, narrator: Narrator, environment: Environment) -> None:
    shell.run("up", f"millrace up {_other_ports()}", activated=False)
    layout = Layout.current(environment)
    narrator.tell("stack up: broker, Ray, MLflow, Feast, Serve, stream worker", stack_s=round(narrator.seconds, 1))
    _stream(shell, narrator, layout)
    edits = shell.run("train-edits", "ray job submit -- python ray_jobs/train_edits.py")
    narrator.tell(
        f"robot model from point-in-time features: AUROC {edits['auroc']:.3f} on users it has not seen", edits=edits
    )
    speech = shell.run("train-whisper", f"ray job submit -- python ray_jobs/train_whisper.py --config {WHISPER}")
    narrator.tell(
        f"Whisper on {speech['source']} digits, two Ray Train workers: WER {speech['wer_before']:.3f} -> "
        f"{speech['wer_after']:.3f} in {speech['seconds']:.0f} s",
        speech=speech,
    )
    _requests(narrator, layout, environment)
    evaluation = shell.run("evaluate", f"ray job submit -- python ray_jobs/evaluate.py --config {WHISPER}")
    champion, baseline = evaluation["champion"], evaluation["baseline"]
    narrator.tell(
        f"evaluation: champion WER {champion['wer']:.3f} [{champion['wer_low']:.3f}, {champion['wer_high']:.3f}], "
        f"untrained baseline {baseline['wer']:.3f}",
        evaluation=evaluation,
        report=evaluation["report"]["html"],
    )


def _other_ports() -> str:
    """Options for the ports that something else on this machine holds."""
    taken = [port.name for port in fields(Ports) if not is_free(int(str(port.default)))]
    return " ".join(f"--{name}-port {port}" for name, port in zip(taken, free_ports(len(taken)), strict=True))


def _stream(shell: Shell, narrator: Narrator, layout: Layout) -> None:
    simulated = shell.run("simulate", "millrace simulate wikipedia")
    began_s = time.time() - simulated["seconds"]
    counts = _caught_up(layout, simulated["messages"])
    log = layout.home / "features" / "offline" / "editor_activity"
    written = pq.read_table(log, columns=["event_timestamp", "created_timestamp"])
    finished = max(value for value in written["created_timestamp"].to_pylist())
    seconds = max(finished.timestamp() - began_s, simulated["seconds"])
    narrator.tell(
        f"{simulated['messages']:,} {simulated['source']} edits into features in {seconds:.1f} s "
        f"({simulated['messages'] / seconds:,.0f} events/s, simulator included), {counts['dead']} dead, "
        f"{counts['late']} late",
        stream={**simulated, **counts, "into_features_s": round(seconds, 2)},
    )
    clock: datetime = max(value for value in written["event_timestamp"].to_pylist())
    repository = REPOSITORY / "feature_repo"
    os.environ |= layout.variables()
    fresh = freshness.measure(layout.kafka, repository, clock + timedelta(seconds=5), FRESHNESS_RATE_HZ, FRESHNESS_S)
    narrator.tell(
        f"freshness at {fresh.events_per_s:,.0f} events/s, producer to online store: p50 {fresh.p50_ms:.0f} ms, "
        f"p99 {fresh.p99_ms:.0f} ms",
        freshness=asdict(fresh),
    )


def _caught_up(layout: Layout, messages: int) -> dict[str, int]:
    """Wait until every message is accounted for and its rows are in the log, as a checkpoint says; returns counts."""
    deadline_s = time.monotonic() + CAUGHT_UP_S
    while time.monotonic() < deadline_s:
        partitions = read_views(layout.stream).get("editor_activity", {}).values()
        counts = {name: sum(row[name] for row in partitions) for name in ("processed", "dead", "late")}
        if sum(counts.values()) >= messages and all(row["offset"] == row["end"] for row in partitions):
            return counts
        time.sleep(0.2)
    raise DemoError(f"the stream worker did not catch up in {CAUGHT_UP_S:.0f} s; its log is {layout.log('stream')}.")


def _requests(narrator: Narrator, layout: Layout, environment: Environment) -> None:
    users = requests.recent_users(layout.home / "features" / "offline" / "editor_activity", requests.EDITS)
    waves = requests.utterances(REPOSITORY / WHISPER, environment.data, environment.home, requests.TRANSCRIPTIONS)
    with requests.Client(layout.serve, environment.api_keys) as client:
        client.wait_for("whisper", "edits")
        speech = client.transcribe(waves)
        edits = client.infer(users)
    narrator.tell(
        f"served: transcription p50 {speech.p50_ms:.0f} ms, p95 {speech.p95_ms:.0f} ms; "
        f"edits with features p50 {edits.p50_ms:.0f} ms, p95 {edits.p95_ms:.0f} ms",
        transcription=asdict(speech),
        infer=asdict(edits),
    )
