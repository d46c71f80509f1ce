"""The audit log: every change has its entry, and no entry can be changed, lost or put in between."""

from __future__ import annotations

import json
import threading

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from loramux.tenancy import AuditError, Limits
from loramux.tenancy.audit import Head, verify_lines
from tenancy.helpers import both


def fill(tenancy, num=5):
    for i in range(num):
        tenancy.audit.append("someone", "test", f"thing-{i}", {"i": i, "text": "é"})


def test_every_change_of_tenants_and_keys_is_written_down_with_its_actor(tenancy):
    tenancy.tenants.create("acme", actor="ann")
    tenancy.tenants.set_limits("acme", Limits(), actor="ben")
    tenancy.tenants.set_weight("acme", 2, actor="cem")
    made = tenancy.keys.create("acme", ["infer"], actor="dee")
    new = tenancy.keys.rotate(made.key.id, actor="eve")
    tenancy.keys.revoke(new.key.id, actor="fay")
    tenancy.keys.revoke(new.key.id, actor="again")
    tenancy.tenants.disable("acme", actor="gus")
    tenancy.tenants.enable("acme", actor="hal")
    found = [(entry.actor, entry.action, entry.target) for entry in tenancy.audit.entries()]
    assert found == [
        ("ann", "tenant.create", "acme"),
        ("ben", "tenant.limits", "acme"),
        ("cem", "tenant.weight", "acme"),
        ("dee", "key.create", made.key.id),
        ("eve", "key.rotate", made.key.id),
        ("fay", "key.revoke", new.key.id),
        ("gus", "tenant.disable", "acme"),
        ("hal", "tenant.enable", "acme"),
    ]
    exported = "\n".join(tenancy.audit.export())
    assert made.secret not in exported
    assert made.secret.rsplit("_", 1)[1] not in exported


def test_a_change_that_fails_leaves_no_entry_and_no_change(tenancy, monkeypatch):
    tenancy.tenants.create("acme", actor="test")

    def full(*_: object) -> None:
        raise OSError("disk full")

    before = tenancy.audit.verify()
    monkeypatch.setattr(tenancy.audit, "write", full)
    with pytest.raises(OSError, match="disk full"):
        tenancy.keys.create("acme", ["infer"], actor="test")
    with pytest.raises(OSError, match="disk full"):
        tenancy.tenants.disable("acme", actor="test")
    assert tenancy.keys.list() == []
    assert tenancy.tenants.get("acme").disabled_at is None
    assert tenancy.audit.verify() == before


@both
def test_an_intact_chain_verifies_in_the_database_and_as_an_export(tenancy):
    assert tenancy.audit.verify() == Head(0, "0" * 64)
    fill(tenancy)
    head = tenancy.audit.verify()
    assert head.num_entries == 5
    assert verify_lines(tenancy.audit.export()) == head
    fill(tenancy, 2)
    assert tenancy.audit.verify(head).num_entries == 7
    assert [entry.id for entry in tenancy.audit.entries(after=2, limit=3)] == [3, 4, 5]


STATEMENTS = [
    "UPDATE audit_log SET actor = 'nobody' WHERE id = 2",
    "UPDATE audit_log SET id = 9 WHERE id = 5",
    "DELETE FROM audit_log WHERE id = 5",
    "DELETE FROM audit_log",
    "DELETE FROM audit_head",
    "UPDATE audit_head SET num_entries = 1",
    "INSERT INTO audit_log SELECT id + 5, at, actor, action, target, detail, previous, hash FROM audit_log",
    "DELETE FROM api_keys",
    "DELETE FROM tenants",
    "UPDATE api_keys SET revoked_at = NULL",
    "UPDATE api_keys SET tenant = 'other'",
]


@both
def test_the_database_itself_refuses_to_change_or_delete_entries(tenancy, engine):
    tenancy.tenants.create("acme", actor="test")
    tenancy.tenants.create("other", actor="test")
    made = tenancy.keys.create("acme", ["infer"], actor="test")
    tenancy.keys.revoke(made.key.id, actor="test")
    fill(tenancy, 1)
    special = {
        "sqlite": ["INSERT OR REPLACE INTO audit_log SELECT * FROM audit_log WHERE id = 5"],
        "postgresql": ["TRUNCATE audit_log"],
    }
    for statement in (*STATEMENTS, *special[engine.dialect.name]):
        with (
            engine.connect() as connection,
            pytest.raises(DBAPIError, match="append-only|never deleted|revoked"),
        ):
            connection.execute(text(statement))
    assert tenancy.audit.verify().num_entries == 5


TAMPERED = {
    "UPDATE audit_log SET detail = '{}' WHERE id = 2": "entry 2 was changed",
    "UPDATE audit_log SET actor = 'nobody' WHERE id = 3": "entry 3 was changed",
    "UPDATE audit_log SET at = at + 1 WHERE id = 4": "entry 4 was changed",
    "DELETE FROM audit_log WHERE id = 2": "entry 2 is missing",
    "DELETE FROM audit_log WHERE id > 3": "5 entries were written, 3 are there",
    "UPDATE audit_log SET id = 99 WHERE id = 1": "entry 1 is missing",
    "UPDATE audit_log SET previous = hash WHERE id = 5": "entry 5 does not follow",
    "UPDATE audit_head SET hash = 'x'": "does not end as the recorded head says",
}


@pytest.mark.parametrize("statement", TAMPERED)
def test_who_gets_past_the_triggers_is_found_out_by_the_chain(tenancy, engine, statement):
    fill(tenancy)
    lines = list(tenancy.audit.export())
    with engine.begin() as connection:
        for name in ("audit_log_fixed", "audit_log_kept"):
            connection.execute(text(f"DROP TRIGGER {name}"))
        connection.execute(text(statement))
    with pytest.raises(AuditError, match=TAMPERED[statement]):
        tenancy.audit.verify()
    assert verify_lines(iter(lines)).num_entries == 5, "the export from before is whole"


def test_a_chain_written_anew_does_not_contain_the_head_kept_elsewhere(tenancy, engine):
    fill(tenancy)
    kept = tenancy.audit.verify()
    with engine.begin() as connection:
        for name in ("audit_log_fixed", "audit_log_kept", "audit_head_rises"):
            connection.execute(text(f"DROP TRIGGER {name}"))
        connection.execute(text("DELETE FROM audit_log"))
        connection.execute(text(f"UPDATE audit_head SET num_entries = 0, hash = '{'0' * 64}'"))
    for num, message in ((4, "once, now there are 4"), (2, "is not the one")):
        fill(tenancy, num)
        tenancy.audit.verify()  # by itself it looks whole
        with pytest.raises(AuditError, match=message):
            tenancy.audit.verify(kept)


def test_an_export_that_was_edited_does_not_verify(tenancy):
    fill(tenancy)
    lines = list(tenancy.audit.export())
    edited = json.loads(lines[2]) | {"target": "another"}
    for broken in (
        [*lines[:2], json.dumps(edited), *lines[3:]],
        [*lines[:2], *lines[3:]],
        [lines[1], lines[0], *lines[2:]],
        [*lines, "{}"],
        [*lines, "no JSON"],
    ):
        with pytest.raises(AuditError):
            verify_lines(iter(broken))


@both
def test_writers_at_once_make_one_chain(tenancy, second):
    others = [tenancy, second(), second()]

    def write(books, name: str) -> None:
        for i in range(8):
            books.audit.append(name, "test", str(i))

    threads = [
        threading.Thread(target=write, args=(books, str(i))) for i, books in enumerate(others)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tenancy.audit.verify().num_entries == 24
    for name in "012":
        mine = [entry.target for entry in tenancy.audit.entries() if entry.actor == name]
        assert mine == [str(i) for i in range(8)]


def test_an_entry_names_what_changed_and_does_not_hold_it(tenancy):
    with pytest.raises(AuditError, match="at most 10000"):
        tenancy.audit.append("a", "b", "c", {"prompt": "x" * 10_001})
    assert tenancy.audit.verify().num_entries == 0
