"""Evaluations of checkpoints as Ray tasks: the adapter that takes them to any node of the cluster.

Not Ray Train's own validation, which starts from `ray.train.report` of a checkpoint: ours are not reported to it, and
the same evaluations are to run beside a job that Ray Train, or Ray, knows nothing of.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from workloads.online_child import evaluate_apart
from workloads.record import RunFolder


class ClusterTask:
    """An evaluation as a task of one CPU; it waits until one is free beside the workers, or until they are done."""

    def __init__(self, run: RunFolder, step: int, home: Path, job_id: str) -> None:
        self._arguments = str(run.path), step, str(home), job_id
        self._task: Any = None

    def wait(self, timeout_s: float) -> bool:
        import ray

        if self._task is None:
            if not ray.is_initialized():  # the main thread connects when it trains; a second one would be a new cluster
                time.sleep(timeout_s)
                return False
            # a worker that serves one call: the next task would inherit its priority
            remote = ray.remote(num_cpus=1, max_calls=1, max_retries=1)(evaluate_apart)
            self._task = remote.remote(*self._arguments)
        done, _ = ray.wait([self._task], timeout=timeout_s)
        ray.get(done)
        return bool(done)

    def end(self) -> None:
        import ray

        if self._task is not None:
            ray.cancel(self._task, force=True)
            ray.wait([self._task], timeout=10)
