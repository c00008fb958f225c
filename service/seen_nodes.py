"""The most nodes that a cluster lately had: what fits on them only waits while some are away, and is not refused.

Machines that joined a head restart; after a restart of the head all of them are away for minutes, and so is what the
service knew. So it is a file of the home, `nodes.json`, which the front end that leads writes and all of them read.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from service.packing import Hardware
from workloads.record import write_atomic

logger = logging.getLogger(__name__)

AWAY_S = 24 * 3600.0  # a machine that is away for longer is not expected back
RENEWED_S = 3600.0  # how old the time in the file may be

Sizes = list[Mapping[str, float]]


class SeenNodes:
    """Knows nothing but its file."""

    def __init__(self, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = home / "nodes.json", clock

    def see(self, hardware: Hardware) -> None:
        """Remembers the nodes that are there, unless there were more lately."""
        if hardware.grows:  # it is told what may come
            return
        sizes: Sizes = sorted((dict(node.total) for node in hardware.nodes), key=lambda size: sorted(size.items()))
        at, known = self._read()
        age = self._clock() - at
        if (0 <= age < AWAY_S and len(sizes) < len(known)) or (0 <= age < RENEWED_S and sizes == known):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps({"at": self._clock(), "nodes": sizes}))
        except OSError as error:  # no reason to leave the jobs alone
            logger.warning("the nodes that are there are not remembered: %s", error)

    def most(self) -> Sizes:
        """Resources of each; [] where nothing was seen lately."""
        at, known = self._read()
        return known if 0 <= self._clock() - at < AWAY_S else []

    def _read(self) -> tuple[float, Sizes]:
        try:
            found = json.loads(self._path.read_text())
            return float(found["at"]), list(found["nodes"])
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or not of ours
            return -math.inf, []
