"""The audit log: who changed what, each entry sealed with the hash of the one before.

Why a chain: an entry that was changed, removed or put in between breaks every hash after it. Triggers in the database
refuse UPDATE and DELETE. Who owns the database can undo both and write a new chain; against that, keep the head that
`verify` returns somewhere else and give it to the next `verify`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select, update

from loramux.registry.db import begin, reading
from loramux.tenancy.errors import AuditError
from loramux.tenancy.tables import audit_head, audit_log

START = "0" * 64
MAX_DETAIL = 10_000  # characters: an entry names what changed, it does not hold it
_PAGE = 1000


@dataclass(frozen=True)
class Entry:
    id: int
    at: float
    actor: str
    action: str
    target: str
    detail: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """How long the chain is and how it ends."""

    num_entries: int
    hash: str


class Audit:
    """wall: seconds since 1970."""

    def __init__(self, engine: Engine, *, wall: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._wall = wall

    def append(
        self, actor: str, action: str, target: str, detail: Mapping[str, Any] | None = None
    ) -> Entry:
        """One entry in a transaction of its own. No secrets, no prompts in `detail`: entries stay for ever."""
        with begin(self._engine) as connection:
            return self.write(connection, actor, action, target, detail)

    def write(
        self,
        connection: Connection,
        actor: str,
        action: str,
        target: str,
        detail: Mapping[str, Any] | None = None,
    ) -> Entry:
        """An entry in the transaction of the change it tells of: both are there, or neither."""
        text = _canonical(dict(detail or {}))
        if len(text) > MAX_DETAIL:
            raise AuditError(f"an audit entry's detail has at most {MAX_DETAIL} characters of JSON")
        # The update comes first: its lock keeps others from reading the same head.
        counted = update(audit_head).values(num_entries=audit_head.c.num_entries + 1)
        connection.execute(counted)
        num, previous = connection.execute(
            select(audit_head.c.num_entries, audit_head.c.hash)
        ).one()
        row = {
            "id": num, "at": round(self._wall(), 6), "actor": actor[:200], "action": action[:100],
            "target": target[:500], "detail": text, "previous": previous,
        }  # fmt: skip
        row["hash"] = _seal(row)
        connection.execute(insert(audit_log).values(**row))
        connection.execute(update(audit_head).values(hash=row["hash"]))
        return _entry(row)

    def entries(self, *, after: int = 0, limit: int | None = None) -> Iterator[Entry]:
        """In the order they were written, from the one after entry `after`."""
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            page = self._page(after, size)
            yield from (_entry(row._asdict()) for row in page)
            if len(page) < size:
                return
            after = page[-1].id
            left = None if left is None else left - len(page)

    def verify(self, known: Head | None = None) -> Head:
        """The head, after every entry was checked; AuditError names the first that is wrong.

        known: a head kept elsewhere, which the chain must still contain.
        """
        at, previous = 0, START
        if known is not None and known.num_entries == 0 and known.hash != START:
            raise AuditError("the head given is of no audit log: an empty one ends in zeros")
        with reading(self._engine) as connection:
            wanted = connection.execute(select(audit_head.c.num_entries, audit_head.c.hash)).one()
        while page := self._page(at, _PAGE):
            for row in page:
                _check(row._asdict(), at + 1, previous)
                at, previous = row.id, row.hash
                if known is not None and at == known.num_entries and previous != known.hash:
                    raise AuditError(f"entry {at} is not the one that the head given was taken of")
                if at == wanted.num_entries and previous != wanted.hash:
                    raise AuditError(f"entry {at} does not end as the recorded head says")
        if at < wanted.num_entries:
            raise AuditError(f"{wanted.num_entries} entries were written, {at} are there")
        if known is not None and at < known.num_entries:
            raise AuditError(f"there were {known.num_entries} entries once, now there are {at}")
        return Head(at, previous)

    def export(self) -> Iterator[str]:
        """One line of JSON per entry; `verify_lines` checks them anywhere."""
        for entry in self.entries():
            yield _canonical(asdict(entry))

    def _page(self, after: int, size: int) -> list[Row[Any]]:
        with reading(self._engine) as connection:
            query = select(audit_log).where(audit_log.c.id > after).order_by(audit_log.c.id)
            return list(connection.execute(query.limit(size)))


def verify_lines(lines: Iterator[str]) -> Head:
    """Check an export without its database; AuditError names the first line that is wrong."""
    at, previous = 0, START
    for line in lines:
        try:
            row = json.loads(line)
            row["detail"] = _canonical(row["detail"])
            _check(row, at + 1, previous)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, AuditError):
                raise
            raise AuditError(f"line {at + 1} of the export is no entry") from None
        at, previous = at + 1, row["hash"]
    return Head(at, previous)


def _check(row: Mapping[str, Any], num: int, previous: str) -> None:
    if row["id"] != num:
        raise AuditError(f"entry {num} is missing, {row['id']} follows {num - 1}")
    if row["previous"] != previous:
        raise AuditError(f"entry {num} does not follow the entry before it")
    if row["hash"] != _seal(row):
        raise AuditError(f"entry {num} was changed after it was written")


def _seal(row: Mapping[str, Any]) -> str:
    names = ("id", "at", "actor", "action", "target", "detail", "previous")
    return hashlib.sha256(_canonical([row[name] for name in names]).encode()).hexdigest()


def _entry(row: Mapping[str, Any]) -> Entry:
    return Entry(**{**row, "detail": json.loads(row["detail"])})


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
