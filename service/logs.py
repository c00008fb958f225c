"""The log of a job in bounded parts: whole lines from a byte on, those of a level or a rank, never the whole file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
ORDER = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CHUNK = 1 << 16  # bytes that are read at a time; a longer line comes in parts
TAIL = 1 << 18  # bytes of an answer that asks for none in particular
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


def lines(path: Path, start: int, stop: int | None = None) -> Iterator[tuple[bytes, int]]:
    """Whole lines from byte `start` on, each with the byte behind it, while they begin before `stop`.

    Half a line at the end is still being written. A missing file has no lines.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(start)
        while stop is None or start < stop:
            line = file.readline(CHUNK)
            if not line.endswith(b"\n") and len(line) < CHUNK:
                return
            start += len(line)
            yield line, start


def begin(path: Path, offset: int | None, limit: int) -> int:
    """Where to read from: `offset`, or the first whole line of the last `limit` bytes."""
    if offset is not None or not path.exists():
        return offset or 0
    size = path.stat().st_size
    if size <= limit:
        return 0
    return next((end for _, end in lines(path, size - limit - 1)), size)


def part(path: Path, offset: int | None, limit: int, wanted: Wanted) -> tuple[str, int]:
    """Lines among `limit` bytes from `offset` on, by default the last ones, and the byte behind them."""
    start = begin(path, offset, limit)
    seen = list(lines(path, start, start + limit))
    text = b"".join(line for line, _ in seen if wanted.takes(line))
    return text.decode(errors="replace"), seen[-1][1] if seen else start
