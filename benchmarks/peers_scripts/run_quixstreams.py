"""quixstreams over the topic, until the seconds are over or all events read; prints events and seconds as JSON.

Set for speed: no changelog topic, one aggregator for all ten values, larger batches from the consumer.
"""

import json
import sys
from datetime import datetime, timedelta
from time import perf_counter
from typing import Any

from aggregates import add, first, result
from quixstreams import Application
from quixstreams.dataframe.windows.aggregations import Aggregator


class Ten(Aggregator):
    """All ten aggregates as one state, which is read and written once an event and window."""

    def initialize(self) -> None:
        """Start without events."""
        return None

    def agg(self, old: list[float] | None, new: dict[str, Any], timestamp: int) -> list[float]:
        """Take an event in."""
        return first(new["added"], new["score"]) if old is None else add(old, new["added"], new["score"])

    def result(self, value: list[float]) -> tuple[float, ...]:
        """Return the values of a closed window."""
        return result(value)


def _time_ms(value: dict[str, Any], *_: object) -> int:
    return int(datetime.fromisoformat(value["time"]).timestamp() * 1000)


def main() -> None:
    """Measure from the first event that was processed to the last."""
    task = json.loads(sys.argv[1])
    events, began_s, ended_s, results = 0, 0.0, 0.0, 0

    def processed(_topic: str, _partition: int, offset: int) -> None:
        nonlocal events, began_s, ended_s
        ended_s = perf_counter()
        if not events:
            began_s = ended_s
        events += 1
        if offset + 1 >= task["events"] or ended_s - began_s > task["seconds"]:
            application.stop()

    def emitted(_: object) -> None:
        nonlocal results
        results += 1

    application = Application(
        task["servers"],
        consumer_group="quixstreams",
        auto_offset_reset="earliest",
        state_dir=task["folder"],
        use_changelog_topics=False,
        on_message_processed=processed,
        loglevel="WARNING",
        consumer_extra_config={"fetch.min.bytes": 100_000, "queued.min.messages": 200_000},
    )
    topic = application.topic(task["topic"], value_deserializer="json", timestamp_extractor=_time_ms)
    frame = application.dataframe(topic)
    for length_s, slide_s in task["windows"]:
        length, name = timedelta(seconds=length_s), f"w{length_s}_{slide_s}"
        window = (
            frame.tumbling_window(length, name=name)
            if length_s == slide_s
            else frame.hopping_window(length, timedelta(seconds=slide_s), name=name)
        )
        window.agg(value=Ten()).final().update(emitted)
    application.run()
    print(json.dumps({"events": events - 1, "seconds": ended_s - began_s, "results": results}))


if __name__ == "__main__":
    main()
