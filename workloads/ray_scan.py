"""Header scans as Ray tasks: the adapter that lets a whole cluster make a manifest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from workloads.data.tarscan import Scan


def on_cluster(
    function: Callable[[str, int | None], Scan], paths: list[str], num_classes: int | None
) -> Iterator[Scan]:
    """A `Mapper` of `workloads.data.indexing`: a task for each shard, spread over the nodes; ray must be connected.

    Raises:
        OSError: what a scan raised.
    """
    import ray

    task = ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD", max_retries=3)
    at_once = max(4, 2 * int(ray.cluster_resources().get("CPU", 1)))  # answers wait for their turn: not all at a time
    pending: deque[Any] = deque()
    for path in paths:
        pending.append(task.remote(path, num_classes))
        if len(pending) >= at_once:
            yield _answer(pending.popleft())
    while pending:
        yield _answer(pending.popleft())


def _answer(reference: Any) -> Scan:
    import ray

    try:
        scan: Scan = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # its own type: a missing shard is an OSError here as anywhere
    return scan
