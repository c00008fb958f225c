"""The real service, in a process of its own that kills itself inside the reconciler's critical section when told to.

    python -m tests.faults.doomed PORT

Its runs are those of `tests.faults.brief`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn

from service.app import build
from service.packing import Hardware, Node
from service.parts import build_parts
from service.ray_jobs import RayJobs
from service.settings import Settings
from tests.service.rest import NoDeployments
from workloads import preflight
from workloads.record import write_atomic

POINTS = (
    "before",
    "during",
    "after",
)  # the row is committed; Ray is being asked; Ray has it and the row does not say so
PID = "service.pid"
CPUS = 4  # so many jobs at a time
ANSWER_S = 0.02  # of Ray to a submission, about
ROOT = Path(__file__).parents[2]


class Doomed(RayJobs):
    """Ray's Jobs API; the file `die-POINT` holds how many submissions are spared before the one that kills."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._home = settings.home

    def submit(self, job_id: str, attempt: int) -> None:
        if self._reached("before"):
            die()
        if self._reached("during"):
            threading.Timer(ANSWER_S, die).start()
        super().submit(job_id, attempt)
        if self._reached("after"):
            die()

    def _reached(self, point: str) -> bool:
        order = self._home / f"die-{point}"
        if not order.exists():
            return False
        spared = int(order.read_text())
        order.write_text(str(spared - 1)) if spared else order.unlink()
        return not spared

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "submit_job":
            kwargs["entrypoint"] = kwargs["entrypoint"].replace("workloads.run", "tests.faults.brief")
            kwargs["runtime_env"]["env_vars"]["PYTHONPATH"] = str(ROOT)
        return super()._call(name, *args, **kwargs)

    def hardware(self) -> Hardware:
        """Told, not asked for: a process that has joined the cluster is ended by Ray when its head dies."""
        return Hardware([Node({"CPU": float(CPUS), "GPU": 0.0})])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def serve(port: int) -> None:
    """Until it is killed."""
    settings = Settings()
    parts = build_parts(settings, ray=Doomed(settings), deployments=NoDeployments(), check=lambda *_: [])  # type: ignore[arg-type]
    uvicorn.run(build(settings, parts), host="127.0.0.1", port=port, log_level="warning")


def keep(port: int) -> None:
    """Starts the service again whenever SIGKILL ends it, and ends when anything else does.

    Each is a fork of this process, which has imported everything: a start takes less than a second, not five. Its
    process id is in `service.pid` of the home.
    """
    logging.basicConfig(level=logging.INFO)
    preflight.warm = lambda: None  # seconds at each start, for checks that are not made
    while True:
        if (pid := os.fork()) == 0:
            serve(port)
            os._exit(1)
        write_atomic(Settings().home / PID, str(pid))
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            sys.exit(f"the service ended with status {status}")


if __name__ == "__main__":
    keep(int(sys.argv[1]))
