"""Tokens at rest and in time: hashed, expiring, revoked, cached for a second."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from service import tokens
from service.errors import Conflict, Forbidden, InvalidToken, NotFound
from service.principal import ALL, LOCAL, Principal
from service.store import Store, Token
from service.tokens import Tokens


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'manta.db'}")
    yield store
    store.close()


@pytest.fixture
def table(store: Store, clock: Clock) -> Tokens:
    return Tokens(store, clock=clock)


def test_only_the_hash_is_kept(table: Tokens, store: Store, tmp_path: Path) -> None:
    row, text = table.create(LOCAL, "ann", "admin", ALL, None)
    assert text.startswith("manta_") and len(text) == 6 + 43  # 256 bits in base64
    assert row.hash == hashlib.sha256(text.encode()).hexdigest()
    store.close()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert row.hash.encode() in files and text.encode() not in files and text[6:].encode() not in files
    assert table.create(LOCAL, "ann", "admin", ALL, None)[1] != text


def test_who_it_is(table: Tokens) -> None:
    row, text = table.create(LOCAL, "ann", "admin", ALL, None)
    assert table.known(text) is None
    assert table.authenticate(text) == table.known(text) == Principal("ann", ALL, "admin", row.id)
    for wrong in (text[:-1], text + "x", text.upper(), row.hash, "", "\u00e4"):
        assert table.known(wrong) is None
        with pytest.raises(InvalidToken, match="not known"):
            table.authenticate(wrong)


def test_it_expires_at_its_time_also_where_it_is_cached(
    table: Tokens, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CACHE_S", 1000.0)
    table.create(LOCAL, "root", "admin", ALL, None)
    _, text = table.create(LOCAL, "ann", "viewer", "default", 60)
    clock.now += 59.9
    assert table.authenticate(text).name == "ann" and table.known(text) is not None
    clock.now += 0.1
    assert table.known(text) is None
    with pytest.raises(InvalidToken, match="has expired"):
        table.authenticate(text)


def test_revoked_is_at_once_here_and_a_second_later_elsewhere(table: Tokens, store: Store, clock: Clock) -> None:
    elsewhere = Tokens(store, clock=clock)
    row, text = table.create(LOCAL, "ann", "admin", ALL, None)
    for one in (table, elsewhere):
        one.authenticate(text)
    first = table.revoke(LOCAL, row.id).revoked_at
    clock.now += 0.5
    assert table.revoke(LOCAL, row.id).revoked_at == first  # again: nothing changes
    assert table.known(text) is None and elsewhere.known(text) is not None
    clock.now += 0.6
    assert elsewhere.known(text) is None
    with pytest.raises(InvalidToken, match="is revoked"):
        elsewhere.authenticate(text)
    assert elsewhere.needed() and Tokens(store, clock=clock).needed()


def test_when_it_was_used_is_noted_once_a_minute(table: Tokens, clock: Clock) -> None:
    row, text = table.create(LOCAL, "ann", "admin", ALL, None)

    def used() -> float | None:
        found = table.find(row.id)
        assert found is not None
        return found.last_used_at

    assert used() is None
    for at, noted in ((1000.0, 1000.0), (1059.0, 1000.0), (1061.0, 1061.0)):
        clock.now = at
        table.authenticate(text)
        assert used() == noted


def test_the_first_one_of_another_process_is_seen_within_a_second(table: Tokens, store: Store, clock: Clock) -> None:
    assert not table.needed() and table.sure
    Tokens(store).create(LOCAL, "ann", "admin", ALL, None)
    assert not table.needed()  # asked a moment ago
    clock.now += 1.1
    assert not table.sure and table.needed()


@pytest.mark.parametrize(("role", "project"), [("viewer", ALL), ("operator", ALL), ("admin", "default")])
def test_the_first_one_must_not_lock_everybody_out(table: Tokens, role: str, project: str) -> None:
    with pytest.raises(Conflict, match="expected an admin of all projects"):
        table.create(LOCAL, "ann", role, project, None)  # type: ignore[arg-type]
    assert not table.needed()


def test_who_may_make_and_end_them(table: Tokens) -> None:
    row, _ = table.create(LOCAL, "root", "admin", ALL, None)
    admin, operator = Principal("eve", "default", "admin", "t"), Principal("bob", "default", "operator", "t")
    own, _ = table.create(admin, "new", "viewer", "default", 1.0)
    for project in (ALL, "other"):
        with pytest.raises(NotFound):
            table.create(admin, "new", "viewer", project, 1.0)
    with pytest.raises(Forbidden):
        table.create(operator, "new", "viewer", "default", 1.0)
    with pytest.raises(NotFound):
        table.create(LOCAL, "new", "viewer", "no-such-project", 1.0)
    with pytest.raises(NotFound):
        table.revoke(admin, row.id)  # of all projects: an admin of one does not even see it
    with pytest.raises(Forbidden):
        table.revoke(operator, own.id)
    assert [one.id for one in table.list(admin)] == [own.id]
    assert len(table.list(LOCAL)) == 2


def test_the_cache_is_bounded(table: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CACHE_SIZE", 4)
    texts = [table.create(LOCAL, f"t{i}", "admin", ALL, None)[1] for i in range(9)]
    assert [table.authenticate(text).name for text in texts] == [f"t{i}" for i in range(9)]
    assert len(table._cache) <= 4


def test_two_front_ends_adopt_one_file(
    table: Tokens, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("x" * 40)
    monkeypatch.setattr(tokens, "_any", lambda _: False)  # both look before either writes
    for one in (table, Tokens(store)):
        one.adopt(file)
    with store.session() as session:
        assert session.query(Token).count() == 1


def test_an_error_of_the_database_does_not_tell_what_was_in_the_statement(store: Store) -> None:
    with pytest.raises(OperationalError) as caught, store.session() as session:
        session.execute(
            Token.__table__.select().where(Token.hash == "canary").with_only_columns(Token.id).suffix_with("!")
        )
    assert "canary" not in str(caught.value)
