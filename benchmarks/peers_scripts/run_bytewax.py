"""bytewax over the topic, until the seconds are over or all events read; prints events and seconds as JSON.

Set for speed: events decoded by orjson a batch at a time, windows that do not sort, one fold for all ten values, and
large batches, because between two of them the windows of every key are looked at.
"""

import json
import sys
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import bytewax.operators as op
import orjson
from aggregates import add, first, result
from bytewax.connectors.kafka import KafkaSource, KafkaSourceMessage
from bytewax.dataflow import Dataflow
from bytewax.operators.windowing import EventClock, SlidingWindower, TumblingWindower, fold_window
from bytewax.testing import TestingSink, run_main

BATCH = 10_000
START = datetime(2026, 1, 1, tzinfo=UTC)
Event = tuple[datetime, int, float]


def _decode(messages: list[KafkaSourceMessage[Any, Any]]) -> list[tuple[str, Event]]:
    events = []
    for message in messages:
        fields = orjson.loads(message.value)
        events.append((fields["user"], (datetime.fromisoformat(fields["time"]), fields["added"], fields["score"])))
    return events


class _Over(Exception):
    pass


def main() -> None:
    """Measure from the first event that was folded to the last, closing the last windows left out."""
    task = json.loads(sys.argv[1])
    windows = task["windows"]
    # An event is folded into every window that it lies in.
    folds_an_event = sum(length_s // slide_s for length_s, slide_s in windows)
    folds, began_s, ended_s = 0, 0.0, 0.0

    def fold(state: list[float], event: Event) -> list[float]:
        nonlocal folds, began_s, ended_s
        ended_s = perf_counter()
        if not folds:
            began_s = ended_s
        folds += 1
        if folds >= task["events"] * folds_an_event or ended_s - began_s > task["seconds"]:
            raise _Over
        return add(state, event[1], event[2]) if state else first(event[1], event[2])

    clock = EventClock(ts_getter=lambda event: event[0], wait_for_system_duration=timedelta(0))
    flow = Dataflow("peer")
    messages = op.input("read", flow, KafkaSource([task["servers"]], [task["topic"]], batch_size=BATCH))
    events = op.flat_map_batch("decode", messages, _decode)
    results: list[object] = []
    for length_s, slide_s in windows:
        length, name = timedelta(seconds=length_s), f"w{length_s}_{slide_s}"
        windower = (
            TumblingWindower(align_to=START, length=length)
            if length_s == slide_s
            else SlidingWindower(align_to=START, length=length, offset=timedelta(seconds=slide_s))
        )
        folded = fold_window(name, events, clock, windower, list, fold, lambda left, right: left, ordered=False)
        values = op.map(f"{name}_result", folded.down, lambda item: (item[0], result(item[1][1])))
        op.output(f"{name}_write", values, TestingSink(results))
    try:
        run_main(flow)
    except BaseException:  # the engine wraps what a step raises
        if not folds or (folds < task["events"] * folds_an_event and ended_s - began_s <= task["seconds"]):
            raise
    print(json.dumps({"events": folds // folds_an_event, "seconds": ended_s - began_s, "results": len(results)}))


if __name__ == "__main__":
    main()
