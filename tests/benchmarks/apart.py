"""Runs a function in processes of its own, so that nothing that was measured before is there to disturb it.

    python -m tests.benchmarks.apart MODULE FUNCTION '{"argument": 1}'

calls it and prints what it returns as the last line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.embedded import Head

LIMIT_S = 600.0


def _command(function: Callable[..., Any], arguments: dict[str, Any], ranks: int | None) -> list[str]:
    launcher: list[str] = []
    if ranks is not None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"]
        launcher += ["--master-port", str(port)]
    call = ["tests.benchmarks.apart", function.__module__, function.__name__, json.dumps(arguments)]
    return [sys.executable, *launcher, "-m", *call]


@contextlib.contextmanager
def started(function: Callable[..., Any], *, ranks: int | None = None, **arguments: Any) -> Iterator[Callable[[], Any]]:
    """Starts `function`, and ends it with the block if it is still there.

    Args:
        function: of a module.
        ranks: so many processes under torchrun; None: one without it.
        arguments: of the function, such as JSON knows.

    Yields:
        what waits for the result, under torchrun that of rank 0.
    """
    process = subprocess.Popen(
        _command(function, arguments, ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )

    def result() -> Any:
        out, err = process.communicate(timeout=LIMIT_S)
        if process.returncode:
            raise RuntimeError(f"{function.__name__} ended with exit code {process.returncode}:\n{err[-4000:]}")
        return json.loads(out.splitlines()[-1])

    try:
        yield result
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
        process.communicate()


def run(function: Callable[..., Any], *, ranks: int | None = None, **arguments: Any) -> Any:
    """As `started`, and waits."""
    with started(function, ranks=ranks, **arguments) as result:
        return result()


@contextlib.contextmanager
def own_cluster(home: Path) -> Iterator[Head]:
    """A cluster of two CPUs that is there for nothing else, to which this process is connected."""
    from cluster import embedded
    from service.local_cluster import signals_raise

    with signals_raise():  # also when this process is ended, the cluster is
        head = embedded.start(home, num_cpus=2)
        try:
            embedded.connect(head.home)
            yield head
        finally:
            import ray  # not before `connect`, which says how

            ray.shutdown()
            embedded.stop(head)


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds: what lay side by side in time is compared."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def main() -> None:
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result))


if __name__ == "__main__":
    main()
