"""The reconciler of a front end in a process that can be killed; Ray is a folder that all front ends see.

python -m tests.service.front NAME HOME DATABASE_URL RAY_FOLDER
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from service.packing import Hardware, Node
from service.ray_jobs import RayStatus, submission_id
from service.reconciler import Reconciler
from service.registry import Registry
from service.settings import Settings
from service.store import Store


class FolderRay:
    """Stands in for RayJobs: a file for each attempt, and a line for each call that would have started one."""

    def __init__(self, folder: Path, name: str, submit_s: float = 0.0) -> None:
        self._attempts, self._calls = folder / "attempts", folder / "calls"
        self._attempts.mkdir(parents=True, exist_ok=True)
        self._name, self._submit_s = name, submit_s

    def statuses(self) -> dict[str, RayStatus]:
        return {path.name: "RUNNING" for path in self._attempts.iterdir()}

    def hardware(self) -> Hardware:
        return Hardware([Node({"CPU": 1000.0})])

    def log_tail(self, job_id: str, attempt: int) -> str:
        return ""

    def submit(self, job_id: str, attempt: int) -> None:
        with open(self._calls, "a") as file:
            file.write(f"{self._name} {submission_id(job_id, attempt)}\n")
        time.sleep(self._submit_s)
        (self._attempts / submission_id(job_id, attempt)).touch()

    def stop(self, job_id: str, attempt: int) -> None:
        with open(self._calls, "a") as file:
            file.write(f"{self._name} stop {submission_id(job_id, attempt)}\n")

    def calls(self) -> list[tuple[str, str]]:
        """(front end, attempt) in their order."""
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [(name, attempt) for name, attempt in (line.split(" ", 1) for line in lines)]


def reconciler(home: Path, url: str, ray: FolderRay) -> Reconciler:
    """Of a front end that has nothing else: it is imported in a moment."""
    settings = Settings(home=home, database_url=url, reconcile_interval_s=0.02)
    store = Store(settings.database)
    registry = Registry(settings, store)
    return Reconciler(settings, store, ray, registry, lambda: None, releases=None)  # type: ignore[arg-type]


if __name__ == "__main__":
    name, home, url, ray_folder = sys.argv[1:]
    reconciler(Path(home), url, FolderRay(Path(ray_folder), name, submit_s=0.02)).start()
    signal.pause()
