"""API keys: who is let in, for how long, and how soon a change reaches everybody."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

import pytest
from sqlalchemy import event, select

from loramux.tenancy import AuthError, Tenancy, tables
from loramux.tenancy.secret import hash_of, key_id_of
from tenancy.helpers import both


@pytest.fixture
def key(tenancy: Tenancy):
    tenancy.tenants.create("acme", weight=2.0, actor="test")
    return tenancy.keys.create("acme", ["infer", "adapters:read"], label="ci", actor="test")


def refused(tenancy: Tenancy, secret: str | None) -> AuthError:
    with pytest.raises(AuthError) as caught:
        tenancy.keys.authenticate(secret)
    return caught.value


@both
def test_a_key_says_whose_it_is_and_what_it_may(tenancy, key):
    caller = tenancy.keys.authenticate(key.secret)
    assert (caller.tenant, caller.key_id, caller.weight) == ("acme", key.key.id, 2.0)
    assert caller.scopes == {"infer", "adapters:read"}
    assert caller.limits == tenancy.tenants.get("acme").limits


def test_the_secret_is_kept_nowhere(tenancy, key, engine, caplog):
    caplog.set_level(logging.DEBUG)
    tenancy.keys.authenticate(key.secret)
    refused(tenancy, key.secret[:-1] + ("0" if key.secret[-1] != "0" else "1"))
    with engine.connect() as connection:
        rows = [
            str(connection.execute(select(table)).all()) for table in tables.metadata.sorted_tables
        ]
    proof = key.secret.rsplit("_", 1)[1]
    for text in (*rows, caplog.text, repr(key), repr(tenancy.keys.list())):
        assert proof not in text
    assert any(hash_of(key.secret) in row for row in rows)


def test_secrets_are_256_random_bits_and_name_their_key(tenancy, key):
    other = tenancy.keys.create("acme", ["infer"], actor="test")
    assert key_id_of(key.secret) == key.key.id
    assert len(key.secret.rsplit("_", 1)[1]) * 4 == 256
    assert key.secret != other.secret
    assert key.key.id != other.key.id


NO_KEYS = [
    *("x", "Bearer", "lmx_", "é" * 40, "\x00", "a" * 100_000, "lmx_" + "g" * 16 + "_" + "0" * 64),
    *(f"{prefix}_" + "0" * 16 + "_" + "0" * 64 for prefix in ("lmx", "LMX", "lmx_", " lmx")),
    "lmx_" + "0" * 16 + "_" + "0" * 64 + "\n",
]


def test_what_is_no_key_is_refused_in_the_same_words_as_a_wrong_one(tenancy, key):
    wrong = key.secret[:-4] + "beef"
    for bad in (*NO_KEYS, key.secret.upper(), key.secret + "0", key.secret[1:]):
        error = refused(tenancy, bad)
        assert (str(error), error.code) == (str(refused(tenancy, wrong)), "invalid_api_key")


@pytest.mark.parametrize("none", [None, ""])
def test_no_key_at_all_is_told_how_to_send_one(tenancy, none):
    assert "Authorization: Bearer" in str(refused(tenancy, none))


def test_revoked_expired_and_unknown_keys_are_refused_in_the_same_words(tenancy, key, wall):
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=5, actor="test")
    tenancy.keys.authenticate(brief.secret)
    wall.now += 5
    tenancy.keys.revoke(key.key.id, actor="test")
    texts = {str(refused(tenancy, secret)) for secret in (brief.secret, key.secret, "lmx_no")}
    assert len(texts) == 1


def test_turning_the_clock_back_does_not_make_a_key_live_longer(tenancy, key, clock, wall):
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=100, actor="test")
    tenancy.keys.authenticate(brief.secret)
    wall.now -= 3600
    clock.now += 99
    tenancy.keys.authenticate(brief.secret)
    clock.now += 1
    refused(tenancy, brief.secret)


def test_turning_the_clock_back_does_not_help_when_the_tenant_is_read_again(
    tenancy, key, clock, wall
):
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=100, actor="test")
    tenancy.keys.authenticate(brief.secret)
    wall.now -= 3600
    tenancy.tenants.set_weight("acme", 3.0, actor="test")
    clock.now += 101
    refused(tenancy, brief.secret)


def test_a_clock_that_jumps_ahead_lets_nobody_in_and_locks_nobody_out_for_good(tenancy, key, wall):
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=100, actor="test")
    wall.now += 3600
    refused(tenancy, brief.secret)
    wall.now -= 3600
    tenancy.keys.authenticate(brief.secret)


def test_a_key_revoked_while_the_clock_is_set_right_stays_revoked(tenancy, second, wall):
    """Regression: what was made anew for the clock was older than the revocation, and was kept for good."""
    tenancy.tenants.create("acme", actor="test")
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=100, actor="test")
    wall.now += 3600
    other = second()
    refused(other, brief.secret)
    wall.now -= 3600
    revoking = threading.Thread(
        target=other.keys.revoke, args=(brief.key.id,), kwargs={"actor": "x"}
    )
    inner = other.cache._entry

    def slowly(key_id):
        made = inner(key_id)
        if not revoking.ident:
            revoking.start()
            revoking.join(0.3)  # it may have to wait for this one
        return made

    other.cache._entry = slowly
    with contextlib.suppress(AuthError):
        other.keys.authenticate(brief.secret)
    revoking.join()
    refused(other, brief.secret)


@both
def test_both_keys_are_valid_while_a_rotation_overlaps(tenancy, key, wall):
    wall.now += 1
    new = tenancy.keys.rotate(key.key.id, overlap_s=60, actor="test")
    assert new.key.scopes == key.key.scopes
    for secret in (key.secret, new.secret):
        assert tenancy.keys.authenticate(secret).tenant == "acme"
    wall.now += 60
    refused(tenancy, key.secret)
    tenancy.keys.authenticate(new.secret)
    old, fresh = tenancy.keys.list("acme")
    assert (old.replaced_by, old.state(wall()), fresh.state(wall())) == (
        new.key.id,
        "expired",
        "valid",
    )


def test_a_rotation_never_makes_the_old_key_live_longer(tenancy, key, wall):
    brief = tenancy.keys.create("acme", ["infer"], expires_in_s=30, actor="test")
    new = tenancy.keys.rotate(brief.key.id, overlap_s=3600, actor="test")
    assert new.key.expires_at == wall() + 30
    wall.now += 29
    tenancy.keys.authenticate(brief.secret)
    wall.now += 1
    refused(tenancy, brief.secret)


@pytest.mark.parametrize("how", ["revoked", "expired", "replaced"])
def test_a_key_that_is_over_cannot_be_rotated(tenancy, key, wall, how):
    made = tenancy.keys.create("acme", ["infer"], expires_in_s=10, actor="test")
    if how == "revoked":
        tenancy.keys.revoke(made.key.id, actor="test")
    elif how == "expired":
        wall.now += 10
    else:
        tenancy.keys.rotate(made.key.id, actor="test")
    with pytest.raises(ValueError, match=f"is {how} and cannot be rotated"):
        tenancy.keys.rotate(made.key.id, actor="test")


@both
def test_a_change_elsewhere_is_seen_after_half_a_second_and_not_asked_for_before(
    tenancy, key, second, clock, engine
):
    other = second()
    tenancy.keys.authenticate(key.secret)
    other.keys.revoke(key.key.id, actor="test")
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: asked.append(args[2]))
    clock.now += 0.49
    for _ in range(100):
        tenancy.keys.authenticate(key.secret)
    assert not asked, "no database call on the hot path"
    clock.now += 0.01
    refused(tenancy, key.secret)
    assert asked


@both
def test_a_disabled_tenant_is_shut_out_everywhere_until_it_is_enabled(tenancy, key, second, clock):
    other = second()
    other.keys.authenticate(key.secret)
    tenancy.tenants.disable("acme", actor="test")
    clock.now += 0.5
    refused(tenancy, key.secret)
    refused(other, key.secret)
    tenancy.tenants.enable("acme", actor="test")
    clock.now += 0.5
    other.keys.authenticate(key.secret)


def test_weight_and_limits_of_known_keys_follow_their_tenant(tenancy, key, clock):
    tenancy.keys.authenticate(key.secret)
    tenancy.tenants.set_weight("acme", 5.0, actor="test")
    clock.now += 0.5
    assert tenancy.keys.authenticate(key.secret).weight == 5.0


def test_the_salt_is_random_per_tenant_and_stays(tenancy, key, clock):
    tenancy.tenants.create("other", actor="test")
    theirs = tenancy.keys.create("other", ["infer"], actor="test")
    salt = tenancy.keys.authenticate(key.secret).salt
    assert len(salt) * 4 == 256
    assert salt != tenancy.keys.authenticate(theirs.secret).salt
    assert salt not in repr(tenancy.keys.authenticate(key.secret))
    tenancy.tenants.set_weight("acme", 7.0, actor="test")
    clock.now += 0.5
    assert tenancy.keys.authenticate(key.secret).salt == salt


def test_nobody_is_let_in_while_revocations_cannot_be_seen(tenancy, key, clock, monkeypatch):
    tenancy.keys.authenticate(key.secret)

    def gone(*_: object) -> None:
        from loramux.registry import StorageError

        raise StorageError("the database is gone", code="database_unavailable")

    real = tables.current
    monkeypatch.setattr(tables, "current", gone)
    clock.now += 0.9
    tenancy.keys.authenticate(key.secret)
    clock.now += 0.6
    error = refused(tenancy, key.secret)
    assert (error.code, error.status) == ("auth_unavailable", 503)
    monkeypatch.setattr(tables, "current", real)
    clock.now += 0.5
    tenancy.keys.authenticate(key.secret)


def test_a_database_that_hangs_holds_up_nobody_who_asks_beside_it(engine, clock, wall, monkeypatch):
    """An event loop asks here: one wait of `PATIENCE_S` at most, then refusals at once until there is an answer."""
    monkeypatch.setattr("loramux.tenancy.cache.PATIENCE_S", 0.2)
    tenancy = Tenancy.open(engine, clock=clock, wall=wall, asks_beside=True)
    tenancy.tenants.create("acme", actor="test")
    key = tenancy.keys.create("acme", ["infer"], actor="test")
    real, asked, answers = tables.current, threading.Event(), threading.Event()

    def hang(connection: object) -> int:
        asked.set()
        assert answers.wait(60)
        return real(connection)

    monkeypatch.setattr(tables, "current", hang)
    clock.now += 0.9
    assert tenancy.keys.authenticate(key.secret).tenant == "acme"  # known for less than a second
    assert asked.wait(60)
    clock.now += 0.15
    error = refused(tenancy, key.secret)
    assert (error.code, error.status) == ("auth_unavailable", 503)
    monkeypatch.setattr("loramux.tenancy.cache.PATIENCE_S", 0.0)
    assert refused(tenancy, key.secret).code == "auth_unavailable"
    answers.set()
    monkeypatch.setattr("loramux.tenancy.cache.PATIENCE_S", 60.0)
    clock.now += 0.5
    assert tenancy.keys.authenticate(key.secret).tenant == "acme"


def test_who_asks_beside_the_database_sees_a_revocation_within_a_second(engine, clock, wall):
    one, two = (Tenancy.open(engine, clock=clock, wall=wall, asks_beside=True) for _ in range(2))
    one.tenants.create("acme", actor="test")
    key = one.keys.create("acme", ["infer"], actor="test")
    clock.now += 1.0
    assert two.keys.authenticate(key.secret).tenant == "acme"
    one.keys.revoke(key.key.id, actor="test")
    assert refused(one, key.secret).code == "invalid_api_key"
    clock.now += 1.0
    assert refused(two, key.secret).code == "invalid_api_key"


@pytest.mark.parametrize("beside", [False, True])
def test_a_database_that_fails_in_a_way_nobody_foresaw_lets_nobody_in_and_is_asked_again(
    engine, clock, wall, monkeypatch, beside
):
    tenancy = Tenancy.open(engine, clock=clock, wall=wall, asks_beside=beside)
    tenancy.tenants.create("acme", actor="test")
    key = tenancy.keys.create("acme", ["infer"], actor="test")

    def explode(connection: object) -> int:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(tables, "current", explode)
        clock.now += 1.0
        with pytest.raises((AuthError, ZeroDivisionError)):
            tenancy.keys.authenticate(key.secret)
    clock.now += 1.0
    assert tenancy.keys.authenticate(key.secret).tenant == "acme"


@pytest.mark.parametrize("scopes", [[], ["infr"], ["infer", "root"]])
def test_a_key_needs_scopes_that_exist(tenancy, key, scopes):
    before = tenancy.keys.list()
    with pytest.raises(ValueError, match="scope"):
        tenancy.keys.create("acme", scopes, actor="test")
    assert tenancy.keys.list() == before


def test_a_key_of_an_unknown_tenant_is_not_made(tenancy, key):
    with pytest.raises(ValueError, match="did you mean 'acme'"):
        tenancy.keys.create("acne", ["infer"], actor="test")


def test_wrong_secrets_of_a_key_take_as_long_as_keys_that_do_not_exist(tenancy, key, caplog):
    """A coarse bound on one shared machine; the comparison itself is `hmac.compare_digest`."""
    caplog.set_level(logging.WARNING)  # what is measured is not the log
    near = [key.secret[:-4] + f"{i:04x}" for i in range(500)]
    far = [f"lmx_{i:016x}_{key.secret[-64:]}" for i in range(500)]
    best = {"near": float("inf"), "far": float("inf")}
    for _ in range(5):
        for name, secrets in (("near", near), ("far", far)):
            start = time.process_time()
            for secret in secrets:
                with contextlib.suppress(AuthError):
                    tenancy.keys.authenticate(secret)
            best[name] = min(best[name], time.process_time() - start)
    assert 0.5 < best["near"] / best["far"] < 2


@both
def test_threads_that_authenticate_while_keys_change_see_each_key_as_it_is(engine, wall):
    tenancy = Tenancy.open(engine, wall=wall, poll_s=0.001)
    tenancy.tenants.create("acme", actor="test")
    stays = tenancy.keys.create("acme", ["infer"], actor="test")
    failures: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.wait(0.001):
                assert tenancy.keys.authenticate(stays.secret).tenant == "acme"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            made = tenancy.keys.create("acme", ["infer"], actor="test")
            tenancy.keys.authenticate(made.secret)
            tenancy.keys.revoke(made.key.id, actor="test")
            refused(tenancy, made.secret)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures
