"""The embedded installation as a whole: Ray's head, and our front end on it."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import httpx

from cluster import embedded
from cluster.embedded import ClusterError, Head

READY_TIMEOUT_S = 120.0


def up(home: Path, *, num_cpus: int | None = None, http_port: int | None = None) -> Head:
    """Starts head and front end, and returns when the service takes requests.

    Raises:
        ClusterError: it runs already, or something did not start; then nothing is left running.
    """
    head = embedded.start(home, num_cpus=num_cpus, http_port=http_port)
    try:
        embedded.connect(head.home)
        _serve(head)
        _wait_until_ready(head)
    except BaseException:
        down(head)
        raise
    return head


def down(head: Head) -> None:
    """Ends what `up` started, in seconds."""
    if "ray" in sys.modules:  # this process is a driver: let go first, or Ray complains of a lost head
        import ray

        ray.shutdown()
    embedded.stop(head)


def _serve(head: Head) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from service.app import deployment
    from service.settings import Settings

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: the terminal is the user's
    settings = Settings(home=head.home, ray_dashboard_url=head.dashboard_url)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=head.http_port), proxy_location="HeadOnly")
    serve.run(deployment(settings), name="manta", route_prefix="/", blocking=False)


def _wait_until_ready(head: Head) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    missing = "no answer yet"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{head.url}/readyz", timeout=5, trust_env=False)
            if answer.status_code == 200:
                return
            missing = answer.text
        except httpx.TransportError as error:
            missing = str(error)
        time.sleep(0.1)
    raise ClusterError(
        f"the service at {head.url} is not ready after {READY_TIMEOUT_S:g} s: {missing}; see {head.home}/head.log"
    )


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM becomes KeyboardInterrupt, so that both ways of asking to end take one path."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def temporary(home: Path, **options: int | None) -> Iterator[Head]:
    """`up`, and `down` however the block ends; a second Ctrl-C while going down is held back."""
    with signals_raise():
        head = up(home, **options)
        try:
            yield head
        finally:
            held = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            down(head)
            for number, handler in held.items():
                signal.signal(number, handler)


def default_home() -> Path:
    from service.settings import Settings

    return Settings().home.absolute()
