"""Figures of a report: scores with their intervals, as SVG in data addresses that need no network."""

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SHOWN_ROWS = 40
COLOURS = ("#1f5fa8", "#b4540a", "#3b7d3b", "#7a3f98", "#666666")


def draw(document: dict[str, Any]) -> list[dict[str, str]]:
    """Draw the leaderboard of each metric and, by the first metric, the largest slices.

    Returns:
        `title`, `source` (a data address) and `text` (what a reader who cannot see the figure should know) of each.
    """
    systems = [system["name"] for system in document["systems"]]
    drawn = []
    for metric in document["metrics"]:
        name = metric["name"]
        rows = [("all samples", {system["name"]: system["scores"][name] for system in document["systems"]})]
        drawn.append({"title": f"{name} with its interval", **_intervals(rows, systems, name)})
    slices = sorted(document["slices"]["shown"], key=lambda part: -part["n"])[:SHOWN_ROWS]
    if slices:
        name = document["metrics"][0]["name"]
        rows = [
            (
                f"{part['dimension']}: {part['label']} (n = {part['n']})",
                {system: part["scores"][system][name] for system in systems},
            )
            for part in sorted(slices, key=lambda part: (part["dimension"], part["label"]))
        ]
        drawn.append({"title": f"{name} by slice", **_intervals(rows, systems, name)})
    return drawn


def _intervals(
    rows: Sequence[tuple[str, dict[str, dict[str, Any]]]], systems: Sequence[str], metric: str
) -> dict[str, str]:
    figure = Figure(figsize=(7.5, 0.9 + 0.2 * len(rows) * (len(systems) + 1)), layout="constrained")
    axes = figure.subplots()
    for place, (_, scores) in enumerate(rows):
        for rank, system in enumerate(systems):
            found = scores[system]
            if found["score"] is None:
                continue
            height = place + (rank + 1) / (len(systems) + 1) - 0.5
            colour = COLOURS[rank % len(COLOURS)]
            if found["low"] is not None:
                axes.plot([found["low"], found["high"]], [height, height], color=colour, linewidth=2)
            axes.plot([found["score"]], [height], "o", color=colour, label=system if place == 0 else None)
    axes.set_yticks(range(len(rows)), [label[:60] for label, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(metric, parse_math=False)
    axes.grid(axis="x", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    for text in figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False).get_texts():
        text.set_parse_math(False)
    return {"source": _data_address(figure), "text": f"{metric}: {len(rows)} rows, {', '.join(systems)}"}


def _data_address(figure: Figure) -> str:
    content = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evaluation"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
