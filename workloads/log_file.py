"""The log of a run in files of bounded size: its beginning and its end stay, whatever is printed in between.

    log.txt          the first 16 MiB
    log.00001.txt    the next ones, of which the newest three stay

Every process of a run appends to the newest file, whole lines each; the one that finds it full begins the next. There
is no lock between machines: a file may become a few lines longer than its limit. A place in the log is one number,
`file * STRIDE + byte`, which only grows; in a log of one file it is the byte.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from workloads.log_lines import TextFormatter

SEGMENT_BYTES = 16 << 20
KEEP = 3  # files beside the first
STRIDE = 1 << 32
MOST_CHARACTERS = 1 << 18  # of a message
CHUNK = 1 << 16  # bytes that are read at a time; a longer line comes in parts
FORMAT = "%(asctime)s %(levelname)s {who}%(name)s: %(message)s"
CUT = "the log has more than its files may hold: what stood between its first file and this line may be gone"


def segment(log: Path, number: int) -> Path:
    """The file of this number; `log` is the first."""
    return log.with_name(f"{log.stem}.{number:05d}{log.suffix}") if number else log


def segments(log: Path) -> list[int]:
    """Numbers of the files that are there, in their order; the first alone is answered without a look at the folder."""
    try:
        full = log.stat().st_size >= SEGMENT_BYTES
    except FileNotFoundError:
        return []
    later = log.parent.glob(f"{log.stem}.[0-9]*{log.suffix}") if full else ()
    return [0, *sorted(int(path.name.split(".")[1]) for path in later)]


def lines(log: Path, start: int, most: int | None = None) -> Iterator[tuple[bytes, int]]:
    """Whole lines from the place `start` on, each with the place behind it.

    Half a line at the end is still being written. A missing file has no lines; of those that were removed it goes on
    with the first that is there.

    Args:
        log: the first file.
        start: where to begin.
        most: bytes after which no other line begins.
    """
    left = most
    while True:
        number, at = divmod(start, STRIDE)
        following = next((n for n in segments(log) if n > number), None)  # before the look: then this one is complete
        path = segment(log, number)
        if path.exists():
            with open(path, "rb") as file:
                file.seek(at)
                while left is None or left > 0:
                    line = file.readline(CHUNK)
                    whole = line.endswith(b"\n") or len(line) == CHUNK or following is not None
                    if not line or not whole:
                        break
                    start += len(line)
                    left = None if left is None else left - len(line)
                    yield line, start
        if following is None or (left is not None and left <= 0):
            return
        start = following * STRIDE


class LogFile(logging.FileHandler):
    """Appends to the log of a run."""

    def __init__(self, log: Path, who: str = "") -> None:
        self._log = log
        self._number = max(segments(log), default=0)
        super().__init__(segment(log, self._number), encoding="utf-8")
        self.setFormatter(TextFormatter(FORMAT.format(who=who)))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        more = len(text) - MOST_CHARACTERS
        return text if more <= 0 else f"{text[:MOST_CHARACTERS]} ... and {more} characters more"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self.stream is not None and os.fstat(self.stream.fileno()).st_size >= SEGMENT_BYTES:
                self._go_on()
        except OSError:
            self.handleError(record)
        super().emit(record)

    def _go_on(self) -> None:
        """Turns to the newest file, or begins the next one and removes the oldest but the first."""
        there = segments(self._log)
        number = max((*there, self._number))
        path = segment(self._log, number)
        begins = not path.exists() or path.stat().st_size >= SEGMENT_BYTES
        number += begins
        if self.stream is not None:
            self.stream.close()
        self.baseFilename, self._number = str(segment(self._log, number).absolute()), number
        self.stream = self._open()
        for old in there:
            if 0 < old <= number - KEEP:
                segment(self._log, old).unlink(missing_ok=True)
        if begins and number > KEEP:
            super().emit(logging.LogRecord(__name__, logging.WARNING, "", 0, CUT, None, None))


def append(log: Path, name: str, message: str) -> None:
    """One warning, of somebody who has no log open."""
    handler = LogFile(log)
    try:
        handler.handle(logging.LogRecord(name, logging.WARNING, "", 0, message, None, None))
    finally:
        handler.close()
