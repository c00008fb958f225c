"""`python -m cluster.health [URL]`: whether this container does its work; the health check of the image.

A container with an installation of its own (`manta serve`) is healthy when the service takes requests; one that is a
node of a cluster, head or worker, when Ray's agent says so of the node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from cluster import embedded

AGENT_PORT = 52365  # Ray's default of --dashboard-agent-listen-port; its health paths need no token
TIMEOUT_S = 5.0


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


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> int:
    """Asks the URL of the command line, else this container."""
    found = problem(argv[0] if argv else url_of(Path(os.environ["MANTA_HOME"])))
    sys.stdout.write((found or "ok") + "\n")
    return found is not None


if __name__ == "__main__":
    sys.exit(main())
