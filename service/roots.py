"""What a job may name: folders and URL prefixes that are allowed, and weights that its submitter may see.

Every text of a JobSpec is looked at, wherever it stands: a method that comes tomorrow may name a file under any key.
Patterns are held by what stands before their first wildcard. Links are followed at the moment of the check: who may
write into an allowed folder is trusted with what its links point to later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from workloads.preflight import Problem
from workloads.spec_any import AnySpec

ANY = "*"
Kind = Literal["job", "model"]
Readable = Callable[[Kind, str], bool]

_URL = re.compile(r"[a-z][a-z0-9+.-]*:(//|:)", re.IGNORECASE)  # also the `::` by which fsspec chains them
_DOTS = re.compile(r"(?:^|[/{,}])\.+(?=$|[/{,}])")  # `.`, `..`, and braces that expand to them: `{.,x}{.,y}`
_WILD = re.compile(r"[*?\[{]")
_REFERENCE = re.compile(r"[\w.-]+(@\d+)?")
_SECRET = re.compile(r"://[^/?#]*@|[?&][^=&]*(sig|token|secret|passw|credential|key|auth)", re.IGNORECASE)  # in a URL
_NAMES = ("name", "register")  # of the catalog, of the job, of its model: no weights are read by these
_FIXED = ("data", "optimizer", "schedule", "precision", "engine", "guards", "resources", "checkpoint")  # nor in these


class Roots:
    """The rule of an installation."""

    def __init__(self, allowed: Sequence[str] | None, home: Path) -> None:
        """Reads nothing.

        Args:
            allowed: absolute folders and URL prefixes; `*`: any; None: none.
            home: of the installation: artifacts of jobs and models lie there.
        """
        self._allowed = [root if root in (ANY, "/") else root.rstrip("/") for root in allowed or ()]
        self._homes = {home, home.resolve()}
        folders = [Path(root) for root in self._allowed if root.startswith("/")]
        self._folders = {*folders, *(folder.resolve() for folder in folders)}

    def problems(self, spec: AnySpec, readable: Readable) -> list[Problem]:
        """What the job names and may not.

        Args:
            spec: the job.
            readable: whether its submitter may read the weights of a job or a model.
        """
        found = []
        for loc, text in _texts(spec.model_dump(mode="json"), []):
            if problem := self._unsafe(text) or self._beyond(text, readable) or self._foreign(loc, text, readable):
                found.append(Problem(loc=loc, message=problem[0], hint=problem[1]))
        return found

    def _unsafe(self, text: str) -> tuple[str, str] | None:
        """What is refused whatever is allowed. The message does not repeat a secret."""
        if "pipe:" in text:
            return "got `pipe:`, a command, expected files", "write the samples to shards"
        if "://" in text and _SECRET.search(text):
            message = "got a URL with a password, key or signature in it, which the job would show to its readers"
            return message, "give the cluster the credentials, by the variables of its store"
        return None if text.isprintable() else ("got a text with control characters, expected none", "leave them out")

    def _beyond(self, text: str, readable: Readable) -> tuple[str, str] | None:
        """A path or URL outside of what is allowed."""
        if ANY in self._allowed or ("/" not in text and not _URL.match(text)):
            return None
        inside = self._url(text) if _URL.match(text) else self._path(text, readable)
        if inside and "\\" not in text and not _DOTS.search(text):
            return None
        roots = ", ".join(self._allowed) or "none is"
        return f"got {text}, expected a path or URL below what is allowed ({roots})", "ask an admin of the installation"

    def _url(self, text: str) -> bool:
        """Also as a web server may read it: `%2e%2e` is `..` to some."""
        inside = any(_below(_held(text), root) for root in self._allowed if _URL.match(root))
        plain = unquote(text)
        return inside and (plain == text or (not _DOTS.search(plain) and "\\" not in plain and self._url(plain)))

    def _path(self, text: str, readable: Readable) -> bool:
        """As it is written, and where its links lead."""
        held = _held(text)
        paths = {Path(held), Path(os.path.realpath(held))}  # not Path.resolve: a loop of links is no error
        return text.startswith("/") and all(self._inside(path, held != text, readable) for path in paths)

    def _inside(self, path: Path, wild: bool, readable: Readable) -> bool:
        kinds: tuple[tuple[str, Kind], ...] = (("runs", "job"), ("registry", "model"))
        for home in self._homes:
            for folder, kind in kinds:
                if path.is_relative_to(home / folder):
                    named = path.relative_to(home / folder).parts
                    return bool(named) and readable(kind, named[0])
            if wild and home.is_relative_to(path):
                return False  # it may expand into what is above
        return any(path.is_relative_to(root) for root in self._folders)

    def _foreign(self, loc: list[str | int], text: str, readable: Readable) -> tuple[str, str] | None:
        """Weights that the submitter may not read, or a name that climbs out of their folder."""
        if loc[-1] in _NAMES or loc[0] in _FIXED:
            return None
        job = text.removeprefix("job:")
        if job != text:
            may = _REFERENCE.fullmatch(job) is not None and "@" not in job and not _DOTS.search(job)
            may = may and readable("job", job)
        else:
            name = text.partition("@")[0]
            may = _REFERENCE.fullmatch(text) is None or (not _DOTS.search(name) and readable("model", name))
        return None if may else (f"got {text!r}, which names no weights that you may read", "GET /v1/models lists them")


def _texts(value: Any, loc: list[str | int]) -> Iterator[tuple[list[str | int], str]]:
    """Every text in a document, and where."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _texts(one, [*loc, key])
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from _texts(one, [*loc, i])


def _held(text: str) -> str:
    """What a pattern cannot leave: all of it, or the folder before its first wildcard."""
    wild = _WILD.search(text)
    return text if wild is None else text[: wild.start()].rpartition("/")[0] + "/"


def _below(text: str, root: str) -> bool:
    return text == root or text.startswith(root + "/")
