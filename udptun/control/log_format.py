"""The two forms of the log: lines for people with key=value, and a JSON object a line for programs."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from datetime import UTC, datetime
from typing import Any

from udptun.config.flags import LogFormat

_TEXT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"

_PLACEHOLDER = re.compile(r"(?: ?\b(?P<key>[a-z_]+)=)?%(?P<kind>%|[-+#0 ]*\d*(?:\.\d+)?[A-Za-z])")
"""One of a message as the code has it: `mtu=%d`, `%s` alone, or `%%`."""


def start_logging(form: LogFormat) -> None:
    """Log to stderr in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form is LogFormat.JSON else logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class JsonFormatter(logging.Formatter):
    """A line is one JSON object: `time`, `level`, `logger`, `message`, the fields as keys, and `exception`.

    What the code logs as `key=%s` is a field.  It is taken from the message's arguments, not from the finished text, so
    a value may hold anything.
    """

    def format(self, record: logging.LogRecord) -> str:
        message, fields = fields_of(record)
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        own: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        # A field of the same name replaces none of these, and they stand first.
        line = own | fields | own
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def fields_of(record: logging.LogRecord) -> tuple[str, dict[str, Any]]:
    """The message without its fields, and the fields: finite numbers and booleans as such, all else as text."""
    template, args = record.msg, record.args
    if not isinstance(template, str) or not isinstance(args, tuple) or not args:
        return record.getMessage(), {}
    fields: dict[str, Any] = {}
    rest = iter(args)

    def put(match: re.Match[str]) -> str:
        if match["kind"] == "%":
            return match[0] % ()
        value = next(rest)
        if match["key"] is None:
            return ("%" + match["kind"]) % (value,)
        # JSON has no infinity and no NaN.
        is_json = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        fields[match["key"]] = value if is_json else str(value)
        return ""

    try:
        message = _PLACEHOLDER.sub(put, template).strip()
    except (StopIteration, TypeError, ValueError):
        return record.getMessage(), {}
    # A library may write its messages in ways that are not ours.
    return (record.getMessage(), {}) if list(rest) else (message, fields)
