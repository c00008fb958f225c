"""What a job may name: folders and URL prefixes to read, others to mirror to, and weights that its submitter may see.

Every text of a JobSpec is looked at, wherever it stands: a method that comes tomorrow may name a file under any key.
The only one that is written to is `checkpoint.mirror`. Runs and models of other projects are never reached by a path,
whatever is allowed.
Patterns are held by what stands before their first wildcard. Links are followed at the moment of the check: who may
write into an allowed folder is trusted with what its links point to later.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from workloads.preflight import Problem
from workloads.spec_any import AnySpec

ANY = "*"
Kind = Literal["job", "model", "folder"]  # the last: a model by its path, which is no public name
Readable = Callable[[Kind, str], bool]

_URL = re.compile(r"[a-z][a-z0-9+.-]*:(//|:)", re.IGNORECASE)  # also the `::` by which fsspec chains them
_DOTS = re.compile(r"(?:^|[/{,}])\.+(?=$|[/{,}])")  # `.`, `..`, and braces that expand to them: `{.,x}{.,y}`
_ELSEWHERE = re.compile(r"(?!file:|local:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FILE = re.compile(r"file://[^/]*(?=/)", re.IGNORECASE)
_LEADS = re.compile(r"(?:^|[:,{])[/~]")  # an absolute path within braces or behind a prefix: `local-dir:/x`
_WILD = re.compile(r"[*?\[{]")
_REFERENCE = re.compile(r"[\w.-]+(@\d+)?")
_SECRET = re.compile(r"://[^/?#]*@|[?&][^=&]*(sig|token|secret|passw|credential|key|auth)", re.IGNORECASE)  # in a URL
_NAMES = ("name", "register")  # of the catalog, of the job, of its model: nothing is read by these but job:<id>
_OF_TRAINING = ("optimizer", "schedule", "precision", "engine", "guards", "checkpoint")
_FIXED = ("after", "priority", "data", "resources", *_OF_TRAINING)  # nor in these
_MIRROR = ["checkpoint", "mirror"]


class Prefixes:
    """Folders and URL prefixes of a setting; `text in prefixes`: what it names, or may expand to, is below one of them.

    Attributes:
        all: whether `*` is among them, so that everything is.
    """

    def __init__(self, roots: Sequence[str] | None) -> None:
        """Reads nothing but links.

        Args:
            roots: absolute folders and URL prefixes; `*`: any; None: none.
        """
        self.all = ANY in (roots or ())
        self._roots = [root if root in (ANY, "/") else root.rstrip("/") for root in roots or ()]
        folders = [Path(root) for root in self._roots if root.startswith("/")]
        self._folders = {*folders, *(folder.resolve() for folder in folders)}

    def __str__(self) -> str:
        return ", ".join(self._roots) or "none is"

    def __contains__(self, text: str) -> bool:
        if self.all:
            return True
        if _URL.match(text):
            return self._url(text)
        return _plain(text) and all(self.hold(path) for path in _paths(text))

    def hold(self, path: Path) -> bool:
        """Whether it is below one of the folders."""
        return self.all or any(path.is_relative_to(root) for root in self._folders)

    def _url(self, text: str) -> bool:
        """Also as a web server may read it: `%2e%2e` is `..` to some."""
        elsewhere = "endpoint_override" in text.lower()  # the job's own server, asked with the credentials of ours
        if elsewhere or _DOTS.search(text) or "\\" in text:
            return False
        plain = unquote(text)
        inside = any(_below(_held(text), root) for root in self._roots if _URL.match(root))
        return inside and (plain == text or self._url(plain))


class Roots:
    """The rule of an installation."""

    def __init__(self, allowed: Sequence[str] | None, mirrors: Sequence[str] | None, home: Path) -> None:
        """Reads nothing but links.

        Args:
            allowed: absolute folders and URL prefixes that jobs may read; `*`: any; None: none.
            mirrors: likewise, of those that jobs may write copies of their checkpoints to.
            home: of the installation: artifacts of jobs and models lie there.
        """
        self._allowed, self._mirrors = Prefixes(allowed), Prefixes(mirrors)
        self._homes = {home, home.resolve()}

    def problems(self, spec: AnySpec, readable: Readable) -> list[Problem]:
        """What the job names and may not.

        Args:
            spec: the job.
            readable: whether its submitter may read the weights of a job or a model; of `*`, of all of them.
        """
        found, readable = [], functools.cache(readable)  # a list of shards asks the same again and again
        for loc, text in texts(spec.model_dump(mode="json"), []):
            if problem := self._unsafe(text) or self._misplaced(loc, text, readable):
                found.append(Problem(loc=loc, message=problem[0], hint=problem[1]))
        return found

    def _misplaced(self, loc: list[str | int], text: str, readable: Readable) -> tuple[str, str] | None:
        if loc == _MIRROR:
            return self._no_mirror(text)
        return self._beyond(text, readable) or self._foreign(loc, text, readable)

    def _unsafe(self, text: str) -> tuple[str, str] | None:
        """What is refused whatever is allowed. The message does not repeat a secret."""
        if "pipe:" in text:
            return "got `pipe:`, a command, expected files", "write the samples to shards"
        if "://" in text and _SECRET.search(text):
            message = "got a URL with a password, key or signature in it, which the job would show to its readers"
            return message, "give the cluster the credentials, by the variables of its store"
        return None if text.isprintable() else ("got a text with control characters, expected none", "leave them out")

    def _beyond(self, text: str, readable: Readable) -> tuple[str, str] | None:
        """A path or URL outside of what is allowed, or in what the submitter may not see."""
        if "/" not in text and not _URL.match(text):
            return None
        if text not in self._allowed and not (_plain(text) and self._own(text, readable)):
            message = f"got {text}, expected a path or URL below what is allowed ({self._allowed})"
            return message, "ask an admin of the installation"
        if self._hidden(text, readable):
            message = f"got {text}, which may lead to runs or models of others, expected an absolute path that does not"
            return message, "weights are named by job:<id> and name@version"
        return None

    def _own(self, text: str, readable: Readable) -> bool:
        """Whether a path leads to runs and models that the submitter may read, which lie nowhere that is allowed."""
        return all(self._seen(path, readable) or self._allowed.hold(path) for path in _paths(text))

    def _hidden(self, text: str, readable: Readable) -> bool:
        """Whether it may lead to a run or a model that the submitter may not read. What is unclear may."""
        if readable("job", ANY):
            return False
        if _URL.match(text):
            return "::" in text or not _ELSEWHERE.match(text)
        wild, dots = _held(text) != text, _DOTS.search(text) is not None
        if text.startswith("/"):
            paths, unclear = _paths(text), wild and dots
        else:  # from wherever a job is started
            starts = {folder for home in self._homes for folder in (home, *home.parents)}
            paths, unclear = {start / _held(text) for start in starts}, dots or _LEADS.search(text) is not None
        above = wild and any(home.is_relative_to(path) for home in self._homes for path in paths)
        return unclear or above or any(self._seen(path, readable) is False for path in paths)

    def _seen(self, path: Path, readable: Readable) -> bool | None:
        """Whether the submitter may read the run or the model in which it is; None: it is in none."""
        kinds: tuple[tuple[str, Kind], ...] = (("runs", "job"), ("registry", "folder"))
        for home in self._homes:
            for folder, kind in kinds:
                if path.is_relative_to(home / folder):
                    named = path.relative_to(home / folder).parts
                    return bool(named) and readable(kind, named[0])
        return None

    def _no_mirror(self, text: str) -> tuple[str, str] | None:
        """A place that jobs may not write to: outside of what is allowed for that, or where runs and models lie."""
        if text not in self._mirrors:
            message = f"got {text}, expected a folder or URL below what is allowed for mirrors ({self._mirrors})"
            return message, "ask an admin of the installation, or leave the mirror out"
        plain = _FILE.sub("", text)
        local = text if plain == text else unquote(plain)
        if any(path.is_relative_to(home) for path in _paths(local) for home in self._homes):
            return f"got {text}, in the home of the installation, expected a place elsewhere", "name another folder"
        return None

    def _foreign(self, loc: list[str | int], text: str, readable: Readable) -> tuple[str, str] | None:
        """Weights that the submitter may not read, or a name that climbs out of their folder."""
        job = text.removeprefix("job:")
        if job == text and (loc[-1] in _NAMES or loc[0] in _FIXED):
            return None
        if job != text:
            may = _REFERENCE.fullmatch(job) is not None and "@" not in job and not _DOTS.search(job)
            may = may and readable("job", job)
        else:
            name = text.partition("@")[0]
            may = _REFERENCE.fullmatch(text) is None or (not _DOTS.search(name) and readable("model", name))
        return None if may else (f"got {text!r}, which names no weights that you may read", "GET /v1/models lists them")


def texts(value: Any, loc: list[str | int]) -> Iterator[tuple[list[str | int], str]]:
    """Every text in a document, and where."""
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from texts(one, [*loc, key])
    elif isinstance(value, list):
        for i, one in enumerate(value):
            yield from texts(one, [*loc, i])


def _held(text: str) -> str:
    """What a pattern cannot leave: all of it, or the folder before its first wildcard."""
    wild = _WILD.search(text)
    return text if wild is None else text[: wild.start()].rpartition("/")[0] + "/"


def _plain(text: str) -> bool:
    """Whether it is an absolute path that goes nowhere but down."""
    return text.startswith("/") and "\\" not in text and _DOTS.search(text) is None


def _paths(text: str) -> set[Path]:
    """What a pattern cannot leave, as it is written, and where links lead."""
    held = _held(text)
    real = os.path.realpath  # not Path.resolve: a loop of links is no error
    return {Path(held), Path(real(held)), Path(real(text))}


def _below(text: str, root: str) -> bool:
    return text == root or text.startswith(root + "/")
