"""`loramux tenant` and `loramux key`, as an operator types them."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from typing import Any

import pytest

from loramux.cli.main import main
from loramux.registry.db import open_database
from loramux.tenancy import AuthError, Tenancy
from loramux.tenancy.audit import verify_lines


@pytest.fixture
def run(database, tmp_path, capsys) -> Callable[..., Any]:
    """Runs a command on the test's database; returns what it wrote as JSON, or its output and error."""
    where = ["--root", str(tmp_path / "registry"), "--url", database]

    def call(*words: str, code: int = 0, parses: bool = True) -> Any:
        more = ["--json", "-"] if parses and not code else []
        assert main([*words, *where, *more]) == code
        done = capsys.readouterr()
        if code:
            return done.err
        return json.loads(done.out) if parses else done.out + done.err

    return call


@pytest.fixture
def server(database) -> Any:
    """What a running server would see; it looks for changes at every request."""
    engine = open_database(database)
    yield Tenancy.open(engine, poll_s=0.0)
    engine.dispose()


def test_a_tenant_and_a_key_made_here_are_let_in_there(run, server):
    made = run(
        "tenant",
        "create",
        "acme",
        "--weight",
        "2",
        "--tokens-per-minute",
        "5000",
        "--max-bytes",
        "none",
    )
    assert (made["name"], made["weight"]) == ("acme", 2.0)
    assert (made["limits"]["tokens_per_minute"], made["limits"]["max_bytes"]) == (5000, None)
    key = run(
        "key",
        "create",
        "acme",
        "--scope",
        "infer",
        "--scope",
        "admin",
        "--label",
        "ci",
        "--expires",
        "90d",
    )
    caller = server.keys.authenticate(key["secret"])
    assert (caller.tenant, caller.key_id, caller.scopes) == ("acme", key["id"], {"infer", "admin"})
    assert caller.limits.tokens_per_minute == 5000
    assert key["expires_at"] - key["created_at"] == pytest.approx(90 * 86400)


def test_a_secret_is_shown_once_and_in_no_list(run):
    run("tenant", "create", "acme")
    shown = run("key", "create", "acme", "--scope", "infer", parses=False)
    (secret,) = re.findall(r"lmx_[0-9a-f]{16}_[0-9a-f]{64}", shown)
    for words in (
        ("key", "list"),
        ("tenant", "show", "acme"),
        ("tenant", "audit", "--export", "-"),
    ):
        assert secret.rsplit("_", 1)[1] not in run(*words, parses=False)


def test_a_file_with_a_secret_is_its_owners_alone(run, tmp_path):
    run("tenant", "create", "acme")
    file = tmp_path / "key.json"
    run("key", "create", "acme", "--scope", "infer", "--json", str(file), parses=False)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["secret"].startswith("lmx_")


def test_keys_are_rotated_listed_and_revoked(run, server):
    run("tenant", "create", "acme")
    old = run("key", "create", "acme", "--scope", "infer")
    new = run("key", "rotate", old["id"], "--overlap", "1h")
    assert {server.keys.authenticate(key["secret"]).tenant for key in (old, new)} == {"acme"}
    run("key", "revoke", old["id"])
    with pytest.raises(AuthError):
        server.keys.authenticate(old["secret"])
    states = {key["id"]: key["state"] for key in run("key", "list", "acme")}
    assert states == {old["id"]: "revoked", new["id"]: "valid"}


def test_limits_change_one_by_one_and_the_others_stay(run, server):
    before = run("tenant", "create", "acme")["limits"]
    run("tenant", "limit", "acme", "--requests-per-minute", "60")
    after = run("tenant", "limit", "acme", "--max-adapters", "none", "--weight", "3")
    assert after["limits"] == before | {"requests_per_minute": 60, "max_adapters": None}
    assert after["weight"] == 3.0


def test_a_disabled_tenant_is_shut_out_until_enabled(run, server):
    run("tenant", "create", "acme")
    key = run("key", "create", "acme", "--scope", "infer")
    assert run("tenant", "disable", "acme")["disabled_at"] is not None
    with pytest.raises(AuthError):
        server.keys.authenticate(key["secret"])
    run("tenant", "enable", "acme")
    server.keys.authenticate(key["secret"])


def test_what_a_tenant_used_and_keeps_is_shown(run, server):
    run("tenant", "create", "acme")
    key = run("key", "create", "acme", "--scope", "infer")
    caller = server.keys.authenticate(key["secret"])
    server.quotas.reserve(caller, 50).settle(42)
    server.close()
    shown = run("tenant", "show", "acme")
    assert shown["used"] == {"requests": 1, "tokens": 42}
    assert shown["kept"] == {"bytes": 0, "adapters": 0}
    assert shown["num_keys"] == 1
    assert [tenant["name"] for tenant in run("tenant", "list")] == ["acme"]


def test_the_audit_log_is_checked_and_exported(run, tmp_path, server):
    run("tenant", "create", "acme", "--actor", "ann")
    head = run("tenant", "audit")
    run("tenant", "disable", "acme", "--actor", "ben")
    file = tmp_path / "audit.jsonl"
    known = f"{head['num_entries']}:{head['hash']}"
    assert run("tenant", "audit", "--export", str(file), "--known", known)["num_entries"] == 2
    lines = file.read_text().splitlines()
    assert verify_lines(iter(lines)).num_entries == 2
    assert [json.loads(line)["actor"] for line in lines] == ["ann", "ben"]
    assert "not the one" in run("tenant", "audit", "--known", f"1:{'0' * 64}", code=2)


def test_room_for_adapters_is_given_as_people_write_sizes(run):
    made = run("tenant", "create", "acme", "--max-bytes", "1.5GiB")
    assert made["limits"]["max_bytes"] == 3 * 2**29
    for size in ("5", "5kb", "none"):
        run("tenant", "limit", "acme", "--max-bytes", size)
    for size in ("measured", "-5GiB", "0GiB", "5XB"):
        assert "a size such as 10GiB" in run("tenant", "limit", "acme", "--max-bytes", size, code=2)
    assert run("tenant", "show", "acme")["limits"]["max_bytes"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("tenant", "list"), ("tenant", "show", "acme"), ("tenant", "audit"), ("key", "list"),
        ("key", "create", "acme", "--scope", "infer"), ("key", "revoke", "0123456789abcdef"),
        ("tenant", "limit", "acme", "--weight", "2"),
    ],
)  # fmt: skip
def test_a_folder_without_a_registry_is_an_error_and_no_registry_is_made_there(
    words, tmp_path, capsys
):
    missing = tmp_path / "mistyped"
    assert main([*words, "--root", str(missing)]) == 2
    assert "there is no registry in" in capsys.readouterr().err
    assert not missing.exists()
    assert main(["tenant", "create", "acme", "--root", str(missing)]) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("tenant", "create", "Acme"), "tenant name"),
        (("tenant", "create", "acme", "--max-bytes", "lots"), "--max-bytes must be a whole number or none"),
        (("tenant", "create", "acme", "--weight", "0"), "0.001 to 1000"),
        (("tenant", "show", "acme"), "there is no tenant 'acme'; there are none yet"),
        (("tenant", "limit", "acme"), "nothing to change"),
        (("key", "create", "acme", "--scope", "infr"), "did you mean 'infer'"),
        (("key", "create", "acme", "--scope", "infer"), "no tenant 'acme'"),
        (("key", "create", "acme", "--scope", "infer", "--expires", "soon"), "a number and s, m, h or d"),
        (("key", "rotate", "0123456789abcdef"), "there is no key"),
        (("key", "revoke", "x"), "there is no key"),
        (("tenant", "audit", "--known", "x"), "--known must be N:HASH"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_way_out_and_changes_nothing(run, server, words, says):
    err = run(*words, code=2)
    assert says in err
    assert err.count("\n") == 1
    assert server.tenants.list() == []
    assert server.audit.verify().num_entries == 0
