"""Whether Ray is about to take away the node of a job that trains in its own driver: Ray Train tells workers only.

Ray Jobs put such a driver on any node. It is asked in a thread, and the control plane alone is asked: a process that
`ray.init` connects would die with its raylet, and lose its signal handlers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

import psutil

from workloads.record import RunFolder

logger = logging.getLogger(__name__)

POLL_S = 5.0  # as Ray Train's own watcher; a job that ends before it has not even imported ray (0.5 s, 37 MiB)


@contextlib.contextmanager
def notice(run: RunFolder) -> Iterator[Callable[[], bool]]:
    """Within, says at no cost whether the node of this process is about to go; an event of `run` tells it once.

    Where Ray Train is told by its environment not to look, as on a cluster of one machine, nobody looks here either.
    """
    told, ended = threading.Event(), threading.Event()
    node = own_node() if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0" else None
    watch = threading.Thread(target=_watch, args=(node, run, told, ended), name="preemption notice", daemon=True)
    if node is not None:
        watch.start()
    try:
        yield told.is_set
    finally:
        ended.set()
        if node is not None:
            watch.join(POLL_S)  # not for ever: Ray waits for a control plane that is gone


def own_node() -> str | None:
    """Id of the node whose raylet, over the supervisor of Ray Jobs and a shell, started this process."""
    try:
        words = (word for process in psutil.Process().parents() for word in process.cmdline())
        return next((word.partition("=")[2] for word in words if word.startswith("--node_id=")), None)
    except psutil.Error:
        return None


def draining() -> dict[str, int]:
    """Nodes that are to go, by id, with the deadline in ms since 1970 (0: none). Blocks; raises errors of Ray."""
    from ray._private.services import _get_gcs_client_options
    from ray._private.state import GlobalState

    state = GlobalState()
    state._initialize_global_state(_get_gcs_client_options(os.environ["RAY_ADDRESS"]))
    found: dict[str, int] = state.get_draining_nodes()
    return found


def _watch(node: str, run: RunFolder, told: threading.Event, ended: threading.Event) -> None:
    said = ""
    while not ended.wait(POLL_S):
        try:
            leaves = node in draining()
        except Exception as error:  # of whatever kind: it must not cost the run
            if said != str(error):
                logger.warning("Ray does not say whether node %s is about to go: %s", node, error)
            said = str(error)
            continue
        if leaves:
            run.event("preempted", f"node {node} of the job's own process is about to go; each step is saved")
            told.set()
            return
