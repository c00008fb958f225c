"""The log of a job in bounded parts: whole lines from a place on, those of a level or a rank, never the whole."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workloads.log_file import STRIDE, lines, segment, segments

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
ORDER = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
TAIL = 1 << 18  # bytes of an answer that asks for none in particular
LOOK_BACK = 1 << 20  # bytes that the longest message has, of `MOST_CHARACTERS`
_HEAD = re.compile(rb"^\d{4}-\d\d-\d\d [\d:,]+ ([A-Z]+) (?:\[rank (\d+)\] )?")


@dataclass
class Wanted:
    """Which lines. A line without a head, as of a traceback, goes with the one before it.

    Attributes:
        level: at least.
        rank: of the worker that wrote it; lines of the job's own process have none.
    """

    level: Level | None = None
    rank: int | None = None
    _last: bool = True

    def takes(self, line: bytes) -> bool:
        """Whether the next line is wanted."""
        if (head := _HEAD.match(line)) is not None:
            level, rank = head[1].decode(), head[2]
            loud = self.level is None or (level in ORDER and ORDER.index(level) >= ORDER.index(self.level))
            self._last = loud and (self.rank is None or (rank is not None and int(rank) == self.rank))
        return self._last

    def begin_at(self, log: Path, start: int) -> None:
        """Looks back to the head of the message within which `start` may lie."""
        number, at = divmod(start, STRIDE)
        earlier = [n for n in segments(log) if n < number]
        if (self.level is None and self.rank is None) or (at == 0 and not earlier):
            return
        number = number if at else earlier[-1]
        with suppress(FileNotFoundError), open(segment(log, number), "rb") as file:
            at = at or os.fstat(file.fileno()).st_size
            first = max(0, at - LOOK_BACK)
            file.seek(first)
            pieces = file.read(at - first).split(b"\n")[first > 0 :]  # of a line that is cut off nothing is known
            if (head := next(filter(_HEAD.match, reversed(pieces)), None)) is not None:
                self.takes(head)


def begin(log: Path, offset: int | None, limit: int) -> int:
    """Where to read from: `offset`, or the first whole line of the last `limit` bytes."""
    if offset is not None:
        return offset
    for number in reversed(segments(log)):
        size = segment(log, number).stat().st_size
        if size > limit:
            after = number * STRIDE + size - limit - 1
            return next((end for _, end in lines(log, after)), number * STRIDE + size)
        limit -= size
    return 0


def part(log: Path, offset: int | None, limit: int, wanted: Wanted) -> tuple[str, int]:
    """Lines among `limit` bytes from `offset` on, by default the last ones, and the place behind them."""
    start = begin(log, offset, limit)
    wanted.begin_at(log, start)
    seen = list(lines(log, start, limit))
    text = b"".join(line for line, _ in seen if wanted.takes(line))
    return text.decode(errors="replace"), seen[-1][1] if seen else start
