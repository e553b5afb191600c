"""Structured logs of the stream: one JSON line an event on standard error."""

import json
import logging
import sys
import time

STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (ISO 8601 UTC), level, logger, event, and whatever `extra` was given."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record; an exception becomes the field `error`."""
        seconds, milliseconds = self.formatTime(record, "%Y-%m-%dT%H:%M:%S"), int(record.msecs)
        line = {
            "time": f"{seconds}.{milliseconds:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in STANDARD and name[0] != "_"},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr() -> None:
    """Send the logs of this process to standard error as JSON lines; libraries only from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonLines()
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("streaming").setLevel(logging.INFO)
