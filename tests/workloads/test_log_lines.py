"""Log lines: what they are about stands in them, and nothing that is logged begins a line of its own."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.log_lines import LONGEST, TextFormatter, about, json_formatter, note, noted
from workloads.record import RunFolder

FORGED = "x\n2026-01-01 00:00:00,000 ERROR service.jobs: forged\r\x1b[31m\u2028\x85 red"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tests.lines")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield logger
    logger.handlers.clear()
    logger.propagate = True


def stream(logger: logging.Logger, formatter: logging.Formatter) -> io.StringIO:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    return text


def test_a_json_line_has_everything(logger: logging.Logger) -> None:
    text = stream(logger, json_formatter(job_id="job-1"))
    with about(request_id="r-1"):
        note(token="ann", project="vision")
        logger.info("attempt %d", 2, extra={"ms": 1.5})
    logger.warning("behind")
    first, second = (json.loads(line) for line in text.getvalue().splitlines())
    assert first.pop("time")[10:] > "T" and first == {
        "level": "INFO",
        "logger": "tests.lines",
        "message": "attempt 2",
        "ms": 1.5,
        "job_id": "job-1",
        "request_id": "r-1",
        "token": "ann",
        "project": "vision",
    }
    assert second.keys() == {"time", "level", "logger", "message", "job_id"}


def test_an_error_brings_its_traceback(logger: logging.Logger) -> None:
    text = stream(logger, json_formatter())
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("failed")
    (line,) = text.getvalue().splitlines()
    assert "ValueError" in json.loads(line)["exc_info"]


@given(st.text(max_size=60))
def test_whatever_is_logged_is_one_record(message: str) -> None:
    record = logging.LogRecord("tests", logging.INFO, "", 0, "%s", (FORGED + message,), None)
    with about(job_id=FORGED + message):
        assert len(json_formatter().format(record).splitlines()) == 1
        first, *others = TextFormatter().format(record).splitlines()
    assert first.endswith("INFO tests: x") and all(line.startswith("    ") for line in others)
    assert not any(character in "".join([first, *others]) for character in "\r\x1b\u2028\x85")


def test_text_tells_what_it_is_about_behind_the_message(logger: logging.Logger) -> None:
    text = stream(logger, TextFormatter("%(levelname)s %(message)s"))
    with about(job_id="job-1"), about(project="vision"):
        logger.info("begins")
    logger.info("ends")
    assert text.getvalue().splitlines() == ["INFO begins [job_id=job-1 project=vision]", "INFO ends"]


def test_a_log_of_a_run_takes_no_forged_line(tmp_path: Path, logger: logging.Logger) -> None:
    run = RunFolder(tmp_path)
    logger.propagate = True
    with run.logging("[rank 0] "):
        logger.warning("sample %s", FORGED)
    heads = [line for line in run.log.read_text().splitlines() if line.startswith("20")]
    assert len(heads) == 1 and "WARNING [rank 0] tests.lines: sample x" in heads[0]


def test_threads_and_ends_are_apart_and_fields_are_bounded() -> None:
    seen = {}
    with about(request_id="r"):
        thread = threading.Thread(target=lambda: seen.update(noted()))
        thread.start()
        thread.join()
        note(job_id="j" * 10_000)
        assert len(noted()["job_id"]) == LONGEST
    assert seen == {} and dict(noted()) == {}
