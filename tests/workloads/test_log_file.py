"""The log stays below a size, whoever writes how much, and each place in it means the same line for ever."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.logs import Wanted, part
from workloads import log_file
from workloads.log_file import CUT, KEEP, STRIDE, LogFile, append, lines, segment, segments
from workloads.record import RunFolder

SMALL = 2000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "SEGMENT_BYTES", SMALL)


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("n", logging.INFO, "", 0, text, None, None)


class Writers:
    """Processes of one run."""

    def __init__(self, log: Path, count: int) -> None:
        self.log = log
        self.handlers = [LogFile(log, f"[rank {rank}] ") for rank in range(count)]
        self.written = 0

    def write(self, rank: int, size: int = 100) -> None:
        self.handlers[rank].handle(record(f"line {self.written} {'x' * size}"))
        self.written += 1

    def close(self) -> None:
        for handler in self.handlers:
            handler.close()


def numbers(found: Any) -> list[int]:
    """Of the lines that are no notice."""
    return [int(line.split(b": line ")[1].split(b" ")[0]) for line, _ in found if b": line " in line]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("log*"))


def test_head_and_tail_stay_and_the_rest_goes(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    writers = Writers(log, 3)
    for i in range(400):
        writers.write(i % 3)
    writers.close()
    assert len(names(tmp_path)) == 1 + KEEP
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < (1 + KEEP) * (SMALL + 500)
    found = numbers(lines(log, 0))
    assert found == sorted(found) and found[:3] == [0, 1, 2] and found[-1] == 399
    assert any(CUT.encode() in line for line, _ in lines(log, 0))


def test_a_short_log_is_one_file_and_a_place_is_a_byte(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with run.logging():
        logging.getLogger("n").warning("short")
    text = run.log.read_text()
    assert names(tmp_path) == ["log.txt"] and text.endswith(" WARNING n: short\n")
    assert [end for _, end in lines(run.log, 0)] == [len(text)]
    append(run.log, "service", "one more\nand its rest")
    assert run.log.read_text().removeprefix(text).endswith("WARNING service: one more\n    and its rest\n")
    assert list(lines(tmp_path / "none.txt", 0)) == [] and segments(tmp_path / "none.txt") == []


def test_who_follows_sees_each_line_once_in_growing_places(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    writers = Writers(log, 2)
    seen: list[tuple[bytes, int]] = []
    for i in range(200):
        writers.write(i % 2)
        if i % 7 == 0:
            seen += lines(log, seen[-1][1] if seen else 0)
    seen += lines(log, seen[-1][1])
    writers.close()
    assert numbers(seen) == list(range(200))  # though most of them are removed by now
    places = [place for _, place in seen]
    assert places == sorted(set(places)) and places[-1] > STRIDE


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 900)), max_size=60), st.integers(1, 3000))
@settings(max_examples=30)
def test_parts_join_to_what_is_there(tmp_path_factory: pytest.TempPathFactory, writes: Any, limit: int) -> None:
    log = tmp_path_factory.mktemp("log") / "log.txt"
    writers = Writers(log, 3)
    for rank, size in writes:
        writers.write(rank, size)
    writers.close()
    whole = b"".join(line for line, _ in lines(log, 0)).decode()
    text, at = "", 0
    while (found := part(log, at, limit, Wanted()))[1] != at:
        text, at = text + found[0], found[1]
    assert text == whole
    tail = part(log, None, limit, Wanted())[0]
    assert whole.endswith(tail) and len(tail) <= limit


def test_a_place_in_a_file_that_is_gone_goes_on_with_the_next(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    writers = Writers(log, 1)
    for _ in range(300):
        writers.write(0)
    writers.close()
    first, *later = segments(log)
    gone = later[0] - 1
    assert first == 0 and not segment(log, gone).exists()
    assert numbers(lines(log, gone * STRIDE + 50)) == numbers(lines(log, later[0] * STRIDE))


def test_one_endless_message_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "MOST_CHARACTERS", 100)
    append(tmp_path / "log.txt", "n", "x" * 1000)
    text = (tmp_path / "log.txt").read_text()
    assert len(text) < 150 and "characters more" in text


def test_a_process_that_comes_later_goes_on_in_the_newest_file(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    writers = Writers(log, 1)
    for _ in range(100):
        writers.write(0)
    writers.close()
    before = segments(log)
    append(log, "n", "of the next attempt")
    assert segments(log) == before and "next attempt" in segment(log, before[-1]).read_text()
