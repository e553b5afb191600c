"""PyFlink SQL over the topic into a blackhole; prints events and seconds as JSON.

Two short jobs warm the JVM up, a tiny one shows what start-up costs, and a long one less the tiny one is the measure.
Set for speed: mini-batches, objects reused, state on the heap, no checkpoints, one slot.
"""

import json
import sys
from time import perf_counter
from typing import Any

from pyflink.table import EnvironmentSettings, TableEnvironment

SETTINGS = {
    "parallelism.default": "1",
    "pipeline.object-reuse": "true",
    "table.exec.mini-batch.enabled": "true",
    "table.exec.mini-batch.allow-latency": "1 s",
    "table.exec.mini-batch.size": "50000",
    "table.local-time-zone": "UTC",
    "state.backend.type": "hashmap",
}
AGGREGATES = (
    "COUNT(added) AS c, SUM(added) AS s, AVG(CAST(added AS DOUBLE)) AS m, MIN(added) AS l, MAX(added) AS h,"
    " STDDEV_SAMP(CAST(added AS DOUBLE)) AS d, AVG(score) AS sm, MIN(score) AS sl, MAX(score) AS sh,"
    " STDDEV_SAMP(score) AS sd"
)
RESULT = (
    "`user` STRING, window_end TIMESTAMP(3), c BIGINT, s BIGINT, m DOUBLE, l BIGINT, h BIGINT, d DOUBLE,"
    " sm DOUBLE, sl DOUBLE, sh DOUBLE, sd DOUBLE"
)


def _seconds(table: TableEnvironment, task: dict[str, Any], number: int, events: int) -> float:
    """How long a job over the first events takes, start-up included."""
    table.execute_sql(
        f"CREATE TABLE edits{number} (`time` TIMESTAMP_LTZ(3), `user` STRING, added BIGINT, score DOUBLE,"
        " WATERMARK FOR `time` AS `time`) WITH ('connector' = 'kafka',"
        f" 'topic' = '{task['topic']}', 'properties.bootstrap.servers' = '{task['servers']}',"
        " 'scan.startup.mode' = 'earliest-offset', 'scan.bounded.mode' = 'specific-offsets',"
        f" 'scan.bounded.specific-offsets' = 'partition:0,offset:{events}',"
        " 'format' = 'json', 'json.timestamp-format.standard' = 'ISO-8601')"
    )
    statements = table.create_statement_set()
    for length_s, slide_s in task["windows"]:
        sink = f"sink{number}_{length_s}_{slide_s}"
        table.execute_sql(f"CREATE TABLE {sink} ({RESULT}) WITH ('connector' = 'blackhole')")
        window = (
            f"TUMBLE(TABLE edits{number}, DESCRIPTOR(`time`), INTERVAL '{length_s}' SECOND(6))"
            if length_s == slide_s
            else f"HOP(TABLE edits{number}, DESCRIPTOR(`time`), INTERVAL '{slide_s}' SECOND(6),"
            f" INTERVAL '{length_s}' SECOND(6))"
        )
        statements.add_insert_sql(
            f"INSERT INTO {sink} SELECT `user`, window_end, {AGGREGATES} FROM TABLE({window})"
            " GROUP BY `user`, window_start, window_end"
        )
    began_s = perf_counter()
    statements.execute().wait()
    return perf_counter() - began_s


def main() -> None:
    """Measure with as many events as fit into the seconds, judged by the short job."""
    task = json.loads(sys.argv[1])
    table = TableEnvironment.create(EnvironmentSettings.in_streaming_mode())
    for name, value in (SETTINGS | {"pipeline.jars": task["jars"]}).items():
        table.get_config().set(name, value)
    tiny, short = task["events"] // 200, task["events"] // 20
    cold_s = _seconds(table, task, 0, short)
    short_s = _seconds(table, task, 1, short)
    tiny_s = _seconds(table, task, 2, tiny)
    guess = (short - tiny) / max(0.1, short_s - tiny_s)
    events = min(task["events"], max(5 * short, int(guess * task["seconds"])))
    long_s = _seconds(table, task, 3, events)
    print(json.dumps({"events": events - tiny, "seconds": long_s - tiny_s, "cold_s": cold_s, "startup_s": tiny_s}))


if __name__ == "__main__":
    main()
