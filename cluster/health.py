"""`python -m cluster.health [URL] [--wait S]`: whether this container does its work; the health check of the image.

A container with an installation of its own (`manta serve`) is healthy when the service takes requests; one that is a
node of a cluster, head or worker, when Ray's agent says so of the node. With `--wait` it asks again for so many
seconds: `helm test` does, whose service is not there before the cluster is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from cluster import embedded

AGENT_PORT = 52365  # Ray's default of --dashboard-agent-listen-port; its health paths need no token
TIMEOUT_S = 5.0
RETRY_S = 5.0


def url_of(home: Path) -> str:
    """What answers 200 when all is well."""
    head = embedded.read(home)
    return f"{head.url}/readyz" if head is not None else f"http://127.0.0.1:{AGENT_PORT}/api/healthz"


def problem(url: str) -> str | None:
    """None when it answers 200, else what it said."""
    try:
        answer = httpx.get(url, timeout=TIMEOUT_S, trust_env=False)
    except httpx.HTTPError as error:
        return f"{url} does not answer: {error}"
    return None if answer.status_code == 200 else f"{url} answers {answer.status_code}: {answer.text[:200]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Asks the URL of the command line, else this container."""
    parser = argparse.ArgumentParser(prog="python -m cluster.health")
    parser.add_argument("url", nargs="?", help="What answers 200 [of this container].")
    parser.add_argument("--wait", type=float, default=0.0, metavar="S", help="Seconds to ask again for [%(default)s].")
    arguments = parser.parse_args(argv)
    url = arguments.url or url_of(Path(os.environ["MANTA_HOME"]))
    deadline = time.monotonic() + arguments.wait
    while (found := problem(url)) and time.monotonic() < deadline:
        time.sleep(RETRY_S)
    sys.stdout.write((found or "ok") + "\n")
    return found is not None


if __name__ == "__main__":
    sys.exit(main())
