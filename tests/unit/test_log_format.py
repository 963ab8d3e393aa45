"""The log for programs: a JSON object a line, whatever is logged."""

from __future__ import annotations

import json
import logging
import sys
from ipaddress import IPv4Network
from typing import Any

import pytest

from udptun.control.log_format import JsonFormatter


def logged(message: object, *args: object, **more: Any) -> dict[str, Any]:
    record = logging.LogRecord("udptun.x", logging.WARNING, "x.py", 1, message, args, more.get("exc_info"))
    record.created = 1_700_000_000.25
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    assert line.pop("time") == "2023-11-14T22:13:20.250Z"
    assert line.pop("level") == "warning"
    assert line.pop("logger") == "udptun.x"
    return line


def test_fields_of_a_message_are_keys_with_their_own_types() -> None:
    subnet = IPv4Network("10.244.1.0/24")
    assert logged("ready subnet=%s mtu=%d is_new=%s age_s=%.1f", subnet, 1472, True, 0.04) == {
        "message": "ready",
        "subnet": "10.244.1.0/24",
        "mtu": 1472,
        "is_new": True,
        "age_s": 0.04,
    }


def test_a_value_may_hold_what_looks_like_fields_quotes_and_lines() -> None:
    text = "a=1 b='2' \"c\"\n\x1b[31m é \udc80"
    assert logged("failed error=%r reason=%s", text, text) == {"message": "failed", "error": text, "reason": text}
    assert logged("%s", text) == {"message": text}


def test_what_is_no_field_stays_in_the_message() -> None:
    assert logged("lease subnet=%s: taken by %s, %d%% of %r", "s", "b", 5, "c") == {
        "message": "lease: taken by b, 5% of 'c'",
        "subnet": "s",
    }
    assert logged("nothing to fill in key=value 100%") == {"message": "nothing to fill in key=value 100%"}


@pytest.mark.parametrize(
    ("message", "args", "text"),
    [
        ("%(a)s", ({"a": 1},), "1"),
        ("%-*d|", (4, 1), "1   |"),
        (ValueError("no"), (), "no"),
    ],
)
def test_messages_of_libraries_are_taken_as_they_are(message: object, args: tuple[object, ...], text: str) -> None:
    assert logged(message, *args) == {"message": text}


def test_numbers_that_json_does_not_have_are_text() -> None:
    """The line said Infinity or NaN, and programs refused all of it."""
    values = float("inf"), float("-inf"), float("nan")
    fields = {"message": "waits", "a_s": "inf", "b_s": "-inf", "c_s": "nan"}
    assert logged("waits a_s=%s b_s=%.1f c_s=%f", *values) == fields


def test_a_field_does_not_replace_what_every_line_has() -> None:
    """One called `level` or `time` stood in the place of the line's own.  `logged` looks at three of the four."""
    assert logged("said time=%s level=%s logger=%s message=%s", 1, 2, 3, 4) == {"message": "said"}


def test_a_traceback_is_a_key() -> None:
    try:
        raise OSError("gone")
    except OSError:
        line = logged("task failed subject=%r", "peers", exc_info=sys.exc_info())
    assert line.pop("exception").endswith("OSError: gone")
    assert line == {"message": "task failed", "subject": "peers"}
