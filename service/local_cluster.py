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
from typing import TYPE_CHECKING, Any

import httpx

from cluster import embedded
from cluster.embedded import ClusterError, Head

if TYPE_CHECKING:
    from service.settings import Settings

READY_TIMEOUT_S = 120.0


def up(
    home: Path,
    *,
    ip: str = embedded.LOOPBACK,
    num_cpus: int | None = None,
    host: str | None = None,
    http_port: int | None = None,
) -> Head:
    """Starts head and front end, and returns when the service takes requests.

    Args:
        home: of the installation.
        ip: at which other machines may join.
        num_cpus: that jobs may use; default: all.
        host: on which the front end listens; default: that of the settings.
        http_port: its port; default: a free one.

    Raises:
        ClusterError: it runs already, something did not start, or it would listen beyond loopback without a token; then
            nothing is left running.
    """
    from service.settings import Settings

    settings = Settings(home=home.absolute())
    settings = settings if host is None else settings.model_copy(update={"host": host})
    _expect_tokens(settings)
    head = embedded.start(
        home,
        ip=ip,
        num_cpus=num_cpus,
        http_host=settings.host,
        http_port=http_port,
        credentials=settings.job_credentials,
    )
    try:
        embedded.connect(head.home)
        _serve(head, settings)
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


def _expect_tokens(settings: Settings) -> None:
    """The app looks again, and waits for its database; here it costs no time, and a person reads the reason."""
    from sqlalchemy.exc import SQLAlchemyError

    from service.errors import ServiceError
    from service.migrate import NewerDatabase
    from service.store import Store
    from service.tokens import NoToken, Tokens, expect_tokens

    default = not settings.database_url.get_secret_value()
    if settings.local and settings.first_admin_token_file is settings.metrics_token_file is None and default:
        return
    try:
        store = Store(settings.database)
    except (SQLAlchemyError, ImportError, NewerDatabase) as error:
        cause = getattr(error, "orig", None) or error
        raise ClusterError(f"got a database that cannot be opened: {cause}; check MANTA_DATABASE_URL") from error
    try:
        expect_tokens(settings, Tokens(store, required=settings.tokens == "required"))
    except (NoToken, ServiceError, ValueError, OSError) as error:
        raise ClusterError(str(error)) from error
    finally:
        store.close()


def _serve(head: Head, settings: Settings) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from service.app import deployment

    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: the terminal is the user's
    settings = settings.model_copy(update={"ray_dashboard_url": head.dashboard_url})
    serve.start(http_options=HTTPOptions(host=head.http_host, port=head.http_port), proxy_location="HeadOnly")
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
def temporary(home: Path, **options: Any) -> Iterator[Head]:
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
