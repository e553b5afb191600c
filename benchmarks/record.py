"""What a benchmark measured: a table on standard output and benchmarks/results/NAME.json."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Figure:
    """One figure; a peer's value stands beside it only when both come from the same run."""

    name: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    conditions: str
    target: float | None = None
    peer: str | None = None
    peer_value: float | None = None

    def as_record(self) -> dict[str, object]:
        """The fields that the design fixes; `ratio` says how many times better than the peer, `met` wants a target."""
        ratio = met = None
        if self.peer_value:
            ratio = self.value / self.peer_value if self.better == "higher" else self.peer_value / self.value
            ratio = round(ratio, 3)
        if self.target is not None:
            met = self.value >= self.target if self.better == "higher" else self.value <= self.target
        return asdict(self) | {"ratio": ratio, "met": met}


def machine() -> str:
    """Where a figure comes from, for its conditions."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, load {load:.1f} at start"


def write(name: str, figures: list[Figure]) -> None:
    """Print the table and replace the result file."""
    for figure in figures:
        record = figure.as_record()
        beside = f"  {record['ratio']}x {figure.peer} ({figure.peer_value:g})" if figure.peer_value else ""
        target = (
            f"  target {figure.target:g}: {'met' if record['met'] else 'missed'}" if figure.target is not None else ""
        )
        print(f"{figure.name:<58} {figure.value:>12,.4g} {figure.unit:<12}{beside}{target}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps([figure.as_record() for figure in figures], indent=2) + "\n")
    print(f"written to {path.relative_to(RESULTS.parents[1])}")
