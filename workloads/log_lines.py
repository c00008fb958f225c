"""Log lines of a process, for people or as JSON, each with what it is about: a request, a job.

    with about(job_id="job-1"):          # for this thread, or this request
        logger.info("attempt 2")         # ... attempt 2 [job_id=job-1]    {"message": "attempt 2", "job_id": "job-1"}

What is logged may come from outside. A line break in it never begins a line that looks like one of ours: JSON escapes
it, and text goes on indented.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

LogFormat = Literal["text", "json"]
PLAIN = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LONGEST = 200  # characters of a field
_CONTROL = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]"
)  # all but \n: escape codes of terminals, other breaks
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=MappingProxyType({}))


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Adds fields to the lines logged within, in this thread or task and in what it calls."""
    before = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(before)


def note(**fields: str) -> None:
    """Adds fields from here on, until the `about` around it ends."""
    _about.set({**_about.get(), **{name: text[:LONGEST] for name, text in fields.items()}})


def noted() -> Mapping[str, str]:
    return _about.get()


class TextFormatter(logging.Formatter):
    """Lines for people, `PLAIN` with the fields behind; further lines of a record are indented."""

    def __init__(self, layout: str = PLAIN) -> None:
        super().__init__(layout)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        line = super().formatMessage(record)
        if fields := " ".join(f"{name}={value}" for name, value in _about.get().items()):
            line = f"{line} [{fields}]"
        return line

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(_escaped, super().format(record)).replace("\n", "\n    ")


def _escaped(found: re.Match[str]) -> str:
    return "\t" if found[0] == "\t" else found[0].encode("unicode_escape").decode()


def json_formatter(**always: str) -> logging.Formatter:
    """One JSON object a line: time, level, logger, message, fields, what the call gave as `extra`, and `always`."""
    from pythonjsonlogger.json import JsonFormatter

    class Lines(JsonFormatter):
        def add_fields(self, data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
            time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
            data |= {"time": time, "level": record.levelname, "logger": record.name}
            super().add_fields(data, record, message_dict)
            data.update({**always, **_about.get()})

    return Lines(["message"])


def from_environment(**always: str) -> None:
    """`configure`, by MANTA_LOG_FORMAT, for the processes of a job."""
    configure("json" if os.environ.get("MANTA_LOG_FORMAT") == "json" else "text", **always)


def configure(log_format: LogFormat, **always: str) -> None:
    """Sends what this process logs to stderr; changes nothing where something sends it elsewhere already.

    Args:
        log_format: `json`, or `text`.
        always: fields of each JSON line, such as the job that the process is.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(json_formatter(**always) if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
