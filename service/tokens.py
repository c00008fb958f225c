"""Bearer tokens: 256 random bits, of which the database holds the SHA-256.

A slow hash (bcrypt, argon2) protects what people invent and remember; nobody guesses 256 random
bits, so a fast one loses nothing, and each request pays microseconds. Rows are found by the hash,
which says nothing of the token; that the whole of it is equal is then compared in constant time.

There are no tokens, and none is asked for, until the first is made: an admin of all projects. From
then on every request needs one, also when all are revoked.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.errors import Conflict, Forbidden, InvalidToken, NotFound
from service.principal import ALL, Principal, Role
from service.settings import Settings
from service.store import Project, Store, Token

PREFIX = "manta_"  # so that people, and scanners of repositories, see what it is
MIN_CHARACTERS = 32  # of a token that came from elsewhere
CACHE_S = 1.0  # for which an answer is believed: a revoked token of another front end lives so long
CACHE_SIZE = 4096
USED_S = 60.0  # between two notes of `last_used_at`


def new_text() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class NoToken(RuntimeError):
    """Others could reach a service that asks nobody who they are."""


class Tokens:
    """The table of tokens; blocking, but for `known`."""

    def __init__(self, store: Store, *, required: bool = False, clock: Callable[[], float] = time.time) -> None:
        """Asks nothing yet.

        Args:
            store: the database.
            required: ask for a token even before there is one.
            clock: seconds since the epoch.
        """
        self._store, self._clock = store, clock
        self._needed = required
        self._asked_at = float("-inf")
        self._cache: dict[str, tuple[float, Principal, float | None]] = {}  # hash -> until, who, expires_at

    @property
    def sure(self) -> bool:
        """Whether `needed` answers without asking the database."""
        return self._needed or self._clock() - self._asked_at <= CACHE_S

    def needed(self) -> bool:
        """Whether requests need a token: there is one, or there was. A yes stays."""
        if not self.sure:
            with self._store.session() as session:
                self._needed = _any(session)
            self._asked_at = self._clock()
        return self._needed

    def known(self, text: str) -> Principal | None:
        """Whose token it is, without asking the database; None: ask `authenticate`."""
        until, principal, expires_at = self._cache.get(digest(text), (0.0, None, None))
        now = self._clock()
        return principal if now < until and (expires_at is None or now < expires_at) else None

    def was_good(self, text: str) -> bool:
        """Whether it was authenticated lately; it may have expired since, or been revoked elsewhere."""
        return digest(text) in self._cache

    def authenticate(self, text: str) -> Principal:
        """Whose token it is.

        Raises:
            InvalidToken: it is unknown, expired or revoked.
        """
        hashed, now = digest(text), self._clock()
        with self._store.session() as session:
            row = session.scalar(sa.select(Token).filter_by(hash=hashed))
            if row is None or not hmac.compare_digest(row.hash, hashed):
                raise InvalidToken("got a token that is not known here", "ask an admin of the project for one")
            if row.revoked_at is not None:
                raise InvalidToken(f"got token {row.id}, which is revoked", "ask an admin of the project for a new one")
            if _over(row, now):
                raise InvalidToken(
                    f"got token {row.id}, which has expired", "ask an admin of the project for a new one"
                )
            if row.last_used_at is None or now - row.last_used_at > USED_S:
                row.last_used_at = now
            principal = Principal(row.name, row.project, row.role, row.id)
            expires_at = row.expires_at
        if len(self._cache) >= CACHE_SIZE:
            self._cache.clear()
        self._cache[hashed] = now + CACHE_S, principal, expires_at
        return principal

    def expect_good(self, principal: Principal) -> None:
        """Raises InvalidToken where the token that somebody came by is no longer good, or the first one was made."""
        with self._store.session() as session:
            row = None if principal.token_id is None else session.get(Token, principal.token_id)
        if row is None and self.needed():
            raise InvalidToken("got a stream that began without a token, expected one by now", "ask again with it")
        if row is not None and (row.revoked_at is not None or _over(row, self._clock())):
            raise InvalidToken(f"got token {row.id}, which is revoked or has expired", "ask an admin for a new one")

    def create(
        self, by: Principal, name: str, role: Role, project: str, lifetime_s: float | None, text: str = ""
    ) -> tuple[Token, str]:
        """A new token and its text, which is told this once.

        Args:
            by: who makes it: an admin of the project.
            name: of the principal it is for.
            role: there.
            project: or `*`.
            lifetime_s: None: it does not expire.
            text: of a token that came from elsewhere; default: a new one.

        Raises:
            NotFound: there is no such project, for `by`.
            Forbidden: `by` is no admin of it.
            Conflict: it would be the first token, and no admin of all projects.
        """
        expect_admin(by, project)
        text, now = text or new_text(), self._clock()
        row = Token(
            id=f"tok-{secrets.token_hex(6)}",
            name=name,
            project=project,
            role=role,
            hash=digest(text),
            created_by=by.name,
            created_at=now,
            expires_at=None if lifetime_s is None else now + lifetime_s,
        )
        with self._store.session() as session:
            if project != ALL and session.get(Project, project) is None:
                raise no_such_project(project)
            if not _any(session) and (role, project) != ("admin", ALL):
                detail = f"got the first token as {role} of {project}, expected an admin of all projects"
                raise Conflict(detail, "from now on every request needs a token; make `admin` of `*` first")
            session.add(row)
        self._needed = True
        return row, text

    def adopt(self, file: Path) -> None:
        """Makes the token in `file` an admin of all projects, where there is no token yet.

        Raises:
            ValueError: it holds too few characters to be one.
            OSError: it cannot be read.
        """
        with self._store.session() as session:
            if _any(session):
                return
        text = _read(file)
        with suppress(IntegrityError):  # another front end, which starts at the same moment, was faster
            self.create(Principal("first-admin-token-file"), "admin", "admin", ALL, None, text)

    def adopt_scraper(self, file: Path) -> None:
        """Makes the token in `file` a viewer of all projects, in place of the one that it held before.

        Raises:
            Conflict: there is no admin yet.
            ValueError: it holds too few characters to be one.
            OSError: it cannot be read.
        """
        text, by = _read(file), Principal("metrics-token-file")
        with self._store.session() as session:
            rows = list(session.scalars(sa.select(Token).filter_by(created_by=by.name, revoked_at=None)))
        for row in rows:
            if row.hash != digest(text):
                self.revoke(by, row.id)
        if digest(text) not in {row.hash for row in rows}:
            with suppress(IntegrityError):  # another front end was faster, or somebody revoked it, which stands
                self.create(by, "metrics", "viewer", ALL, None, text)

    def list(self, by: Principal) -> list[Token]:
        """Those of the projects that `by` sees, the newest first."""
        query = sa.select(Token).order_by(Token.created_at.desc(), Token.id)
        if by.project != ALL:
            query = query.filter_by(project=by.project)
        with self._store.session() as session:
            return list(session.scalars(query))

    def find(self, token_id: str) -> Token | None:
        with self._store.session() as session:
            return session.get(Token, token_id)

    def revoke(self, by: Principal, token_id: str) -> Token:
        """Ends a token; one that is revoked stays as it is.

        Raises:
            NotFound: `by` sees no such token.
            Forbidden: `by` is no admin of its project.
        """
        with self._store.session() as session:
            row = session.get(Token, token_id)
            if row is None or not by.sees(row.project):
                raise no_such_token(token_id)
            expect_admin(by, row.project)
            row.revoked_at = row.revoked_at or self._clock()
        self._cache.clear()
        return row


def _read(file: Path) -> str:
    text = file.read_text().strip()
    if len(text) < MIN_CHARACTERS or not text.isascii() or any(c.isspace() for c in text):
        raise ValueError(
            f"got {len(text)} characters in {file}, expected a token of {MIN_CHARACTERS} or more without spaces; "
            "write one by `openssl rand -hex 32`"
        )
    return text


def _any(session: Session) -> bool:
    """Whether there is a token, or was one."""
    return bool(session.scalar(sa.select(sa.exists().select_from(Token))))


def _over(row: Token, now: float) -> bool:
    return row.expires_at is not None and row.expires_at <= now


def expect_admin(by: Principal, project: str) -> None:
    """Raises NotFound where `by` does not see the project, Forbidden where it is no admin of it."""
    if not by.sees(project):
        raise no_such_project(project)
    if not by.is_at_least("admin"):
        raise Forbidden(f"got {by.role} {by.name}, expected an admin of {project}", "ask one")


def no_such_project(project: str) -> NotFound:
    return NotFound(f"got project {project!r}, which does not exist", "GET /v1/projects lists those of the token")


def no_such_token(token_id: str) -> NotFound:
    return NotFound(f"got token {token_id!r}, which does not exist", "GET /v1/tokens lists them")


def expect_tokens(settings: Settings, tokens: Tokens) -> None:
    """Raises NoToken where the service would listen beyond loopback and ask nobody who it is."""
    if settings.first_admin_token_file is not None:
        tokens.adopt(settings.first_admin_token_file)
    if settings.metrics_token_file is not None:
        tokens.adopt_scraper(settings.metrics_token_file)
    if not settings.local and not tokens.needed():
        raise NoToken(
            f"got host {settings.host} and no token, expected one before other machines can reach the service; make it "
            "by `manta token create NAME --role admin --all-projects`, or name MANTA_FIRST_ADMIN_TOKEN_FILE"
        )
