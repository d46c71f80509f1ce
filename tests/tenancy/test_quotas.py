"""Requests, tokens, streams and uploads: what is let through, what is refused and what is written down."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from loramux.tenancy import Caller, Limits, QuotaError, Quotas
from loramux.tenancy.quotas import Usage
from tenancy.helpers import Clock


def caller(tenant: str = "acme", **limits: int | None) -> Caller:
    values = Limits.none().to_dict() | limits
    return Caller(tenant, "k", frozenset({"infer"}), limits=Limits(**values))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Quotas:
    return Quotas(clock=clock)


def test_the_minute_after_the_limit_is_reached_is_announced_and_then_kept(quotas, clock):
    who = caller(requests_per_minute=3)
    for _ in range(3):
        quotas.reserve(who, 10).settle(10)
    with pytest.raises(QuotaError, match="limit of 3 requests per minute") as refused:
        quotas.reserve(who, 10)
    error = refused.value
    assert (error.code, error.status, error.kind) == ("rate_limit_exceeded", 429, "requests")
    assert error.retry_after_s is not None
    assert error.headers["Retry-After"] == "61"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += error.retry_after_s
    quotas.reserve(who, 10)


def test_headers_say_what_is_left_and_are_silent_about_what_is_not_limited(quotas):
    who = caller(tokens_per_minute=100)
    reservation = quotas.reserve(who, 60)
    assert reservation.headers() == {
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "0s",
    }
    reservation.settle(10)
    assert quotas.headers(who)["x-ratelimit-remaining-tokens"] == "90"
    assert quotas.headers(caller("other")) == {}


def test_tokens_are_reserved_at_most_and_settled_as_used(quotas):
    who = caller(tokens_per_minute=100)
    first = quotas.reserve(who, 90)
    with pytest.raises(QuotaError, match="tokens per minute"):
        quotas.reserve(who, 20)
    first.settle(15)
    quotas.reserve(who, 85)


@pytest.mark.parametrize("how", ["settle", "cancel", "with", "raise"])
def test_every_way_a_request_ends_gives_back_what_it_did_not_use(quotas, how):
    who = caller(tokens_per_minute=100, requests_per_minute=1)
    reservation = quotas.reserve(who, 100)
    if how == "settle":
        assert reservation.settle(0)
    elif how == "cancel":
        assert reservation.cancel()
    elif how == "with":
        with reservation:
            pass
    else:
        with pytest.raises(RuntimeError), reservation:
            raise RuntimeError
    assert quotas.headers(who)["x-ratelimit-remaining-tokens"] == "100"
    # One that ran is a request of this minute, one that never started is not.
    assert quotas.usage("acme").requests == (1 if how == "settle" else 0)
    assert quotas.headers(who)["x-ratelimit-remaining-requests"] == (
        "0" if how == "settle" else "1"
    )


def test_only_the_first_end_of_a_reservation_counts(quotas):
    reservation = quotas.reserve(caller(), 100)
    assert reservation.settle(30)
    assert not reservation.settle(70)
    assert not reservation.cancel()
    assert quotas.usage("acme") == Usage(1, 30)


def test_a_request_that_fits_into_no_minute_is_refused_for_good(quotas):
    with pytest.raises(QuotaError, match="lower max_tokens") as refused:
        quotas.reserve(caller(tokens_per_minute=100), 101)
    assert (refused.value.code, refused.value.status) == ("request_too_large", 400)
    assert refused.value.retry_after_s is None


def test_tenants_do_not_use_up_each_others_limits(quotas):
    quotas.reserve(caller("a", requests_per_minute=1), 1)
    quotas.reserve(caller("b", requests_per_minute=1), 1)


def test_two_keys_of_a_tenant_share_its_limits(quotas):
    quotas.reserve(Caller("a", "k1", frozenset(), limits=Limits(requests_per_minute=1)), 1)
    with pytest.raises(QuotaError):
        quotas.reserve(Caller("a", "k2", frozenset(), limits=Limits(requests_per_minute=1)), 1)


def test_a_new_limit_counts_from_the_next_request_on(quotas):
    quotas.reserve(caller(requests_per_minute=1), 1)
    quotas.reserve(caller(requests_per_minute=2), 1)
    with pytest.raises(QuotaError):
        quotas.reserve(caller(requests_per_minute=2), 1)


def test_threads_that_race_for_the_last_tokens_never_spend_more_than_there_are(quotas):
    limit, size = 1000, 7
    who = caller(tokens_per_minute=limit)
    granted, gate = [], threading.Barrier(8)

    def spend(seed: int) -> None:
        chance = random.Random(seed)
        gate.wait()
        for _ in range(300):
            try:
                reservation = quotas.reserve(who, size)
            except QuotaError:
                continue
            used = chance.randint(0, size)
            if chance.random() < 0.2:
                reservation.cancel()
            else:
                reservation.settle(used)
                granted.append(used)

    threads = [threading.Thread(target=spend, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    quotas.check_integrity()
    assert sum(granted) <= limit, "the clock stood still: all of this is one minute"
    assert sum(granted) > limit - size, "and nothing that was given back is lost"
    assert quotas.usage("acme") == Usage(len(granted), sum(granted)), "the ledger is the sum"


def test_tasks_that_race_cancel_and_fail_settle_to_what_they_used(quotas):
    who = caller(tokens_per_minute=500, max_concurrency=20)
    used: list[int] = []

    async def request(i: int) -> None:
        try:
            with quotas.hold(who), quotas.reserve(who, 10) as reservation:
                done = 0
                try:
                    for _ in range(i % 10):
                        await asyncio.sleep(0)
                        done += 1
                    if i % 7 == 0:
                        raise RuntimeError("the engine failed")
                finally:
                    if reservation.settle(done):
                        used.append(done)
        except (QuotaError, RuntimeError):
            pass

    async def all_of_them() -> None:
        tasks = [asyncio.create_task(request(i)) for i in range(400)]
        await asyncio.sleep(0)
        for task in tasks[::5]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(all_of_them())
    quotas.check_integrity()
    assert sum(used) <= 500
    assert quotas.usage("acme") == Usage(len(used), sum(used))
    assert quotas.headers(who)["x-ratelimit-remaining-tokens"] == str(500 - sum(used))


def test_streams_at_a_time_are_counted_and_given_back(quotas):
    who = caller(max_concurrency=2)
    with quotas.hold(who):
        with quotas.hold(who):
            with (
                pytest.raises(QuotaError, match="2 requests at a time") as refused,
                quotas.hold(who),
            ):
                pass
            assert refused.value.kind == "concurrency"
            assert refused.value.headers["Retry-After"] == "1"
        with quotas.hold(who):
            pass
    quotas.check_integrity()


def test_uploads_count_what_is_kept_and_what_is_under_way():
    kept = {"acme": (600, 1)}
    quotas = Quotas(clock=Clock(), stored=lambda tenant: kept.get(tenant, (0, 0)))
    who = caller(max_bytes=1000, max_adapters=3)
    quotas.check_upload(who, 400)
    with pytest.raises(QuotaError, match="1001 bytes of 1000") as refused:
        quotas.check_upload(who, 401)
    assert (refused.value.code, refused.value.status) == ("insufficient_quota", 403)
    with quotas.hold_upload(who, 300):
        with pytest.raises(QuotaError, match="bytes"):
            quotas.check_upload(who, 101)
        with quotas.hold_upload(who, 50), pytest.raises(QuotaError, match="4 adapters of 3"):
            quotas.check_upload(who, 1)
    quotas.check_upload(who, 400)
    quotas.check_integrity()


def test_parallel_uploads_never_keep_more_than_allowed():
    kept = {"acme": 0}
    quotas = Quotas(clock=Clock(), stored=lambda tenant: (kept[tenant], 0))
    who = caller(max_bytes=1000)
    lock = threading.Lock()

    def upload() -> None:
        for _ in range(50):
            try:
                with quotas.hold_upload(who, 30), lock:
                    kept["acme"] += 30
            except QuotaError:
                pass

    threads = [threading.Thread(target=upload) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept["acme"] == 990


def test_what_could_not_be_written_is_counted_again(quotas):
    quotas.reserve(caller(), 10).settle(4)
    taken = quotas.take_unflushed()
    assert taken == {"acme": Usage(1, 4)}
    assert quotas.take_unflushed() == {}
    quotas.give_back(taken)
    quotas.reserve(caller(), 10).settle(5)
    assert quotas.take_unflushed() == {"acme": Usage(2, 9)}


@pytest.mark.parametrize("bad", [-1, True, 1.5, "9"])
def test_a_limit_is_a_whole_number_or_none(bad):
    with pytest.raises(ValueError, match="requests_per_minute must be a whole number"):
        Limits(requests_per_minute=bad)


def test_an_unknown_limit_is_named_with_what_it_may_have_meant():
    with pytest.raises(ValueError, match="did you mean 'max_bytes'"):
        Limits.from_dict({"max_byte": 3})
