"""What a tenant may use: requests and tokens per minute, streams at a time, bytes and adapters.

Why reserve then settle: a request's tokens are known when it ends. What it may use at most is reserved before it starts
and settled to what it used, also when it failed or was cancelled, so that neither parallel requests nor ones that are
given up get around the limit. One short lock per account; nothing waits inside, so threads and tasks may both call.

The accounts live in this process. `flush` adds what was settled to the database, which is the ledger.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from loramux.tenancy.caller import Caller, Limits
from loramux.tenancy.errors import QuotaError
from loramux.tenancy.window import Window

BUSY_RETRY_S = 1.0  # ours: when a stream ends cannot be known

Stored = Callable[[str], tuple[int, int]]  # tenant -> bytes and adapters it keeps


@dataclass(frozen=True)
class Usage:
    """What was settled."""

    requests: int = 0
    tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.requests + other.requests, self.tokens + other.tokens)


@dataclass(eq=False)
class Account:
    """One tenant's counters in this process."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    num_held: int = 0
    # Its own lock: what is kept is read from the database, and requests must not wait for that.
    uploads: threading.Lock = field(default_factory=threading.Lock)
    pending_bytes: int = 0  # of uploads under way
    pending_adapters: int = 0
    total: Usage = field(default_factory=Usage)
    unflushed: Usage = field(default_factory=Usage)


class Reservation:
    """Room for one request. Settle it once; whatever comes after the first call changes nothing.

    As a context manager it is cancelled at the end unless it was settled.
    """

    def __init__(
        self, quotas: Quotas, account: Account, caller: Caller, tokens: int, started: float
    ):
        self._quotas, self._account, self._caller = quotas, account, caller
        self.tokens = tokens
        self._started = started
        self._is_open = True

    def settle(self, tokens_used: int) -> bool:
        """It used this much, finished or not; whether this call was the one that counts."""
        if tokens_used < 0:
            raise QuotaError(f"tokens used must be 0 or more, got {tokens_used}", kind="tokens")
        return self._end(Usage(1, tokens_used))

    def cancel(self) -> bool:
        """It never started: nothing is counted. One that started is settled with what it used."""
        return self._end(Usage())

    def headers(self) -> dict[str, str]:
        """x-ratelimit-* as they stand now."""
        return self._quotas.headers(self._caller)

    def _end(self, used: Usage) -> bool:
        account = self._account
        with account.lock:
            if not self._is_open:
                return False
            self._is_open = False
            now = self._quotas.clock()
            account.requests.settle(1, used.requests, self._started, now)
            account.tokens.settle(self.tokens, used.tokens, self._started, now)
            account.total += used
            account.unflushed += used
            return True

    def __enter__(self) -> Reservation:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


class Quotas:
    """All accounts of this process. clock: monotonic seconds. stored: what a tenant keeps in the registry."""

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, stored: Stored | None = None
    ) -> None:
        self.clock = clock
        self._stored = stored
        self._lock = threading.Lock()
        self._accounts: dict[str, Account] = {}

    # --- Requests and tokens --------------------------------------------------------------------

    def reserve(self, caller: Caller, tokens: int) -> Reservation:
        """Room for one request of at most `tokens` (prompt and answers), or QuotaError with nothing taken."""
        if tokens < 0:
            raise QuotaError(f"tokens must be 0 or more, got {tokens}", kind="tokens")
        limits = caller.limits
        _check_size(tokens, limits)
        account = self._account(caller.tenant)
        with account.lock:
            now = self.clock()
            _check_minute(account, limits, tokens, now)
            account.requests.reserve(1)
            account.tokens.reserve(tokens)
            return Reservation(self, account, caller, tokens, now)

    @contextmanager
    def hold(self, caller: Caller) -> Iterator[None]:
        """One of the tenant's concurrent requests for as long as the block runs, or QuotaError."""
        account = self._account(caller.tenant)
        with account.lock:
            _check_held(account, caller.limits, self.clock())
            account.num_held += 1
        try:
            yield
        finally:
            with account.lock:
                account.num_held -= 1

    def check_room(self, caller: Caller) -> None:
        """QuotaError if `hold` or a `reserve` of one token would be refused now; nothing is taken."""
        account, limits = self._account(caller.tenant), caller.limits
        with account.lock:
            now = self.clock()
            _check_held(account, limits, now)
            _check_minute(account, limits, 1, now)

    def headers(self, caller: Caller) -> dict[str, str]:
        """x-ratelimit-* for a response; nothing for what is not limited."""
        account = self._account(caller.tenant)
        with account.lock:
            return _headers(account, caller.limits, self.clock())

    # --- Uploads --------------------------------------------------------------------------------

    def check_upload(self, caller: Caller, num_bytes: int, num_adapters: int = 1) -> None:
        """QuotaError if this much more, with the uploads under way, is more than the tenant may keep."""
        account = self._account(caller.tenant)
        with account.uploads:
            self._check_upload(caller, account, num_bytes, num_adapters)

    @contextmanager
    def hold_upload(self, caller: Caller, num_bytes: int, num_adapters: int = 1) -> Iterator[None]:
        """`check_upload`, and the room stays taken until the block ends: parallel uploads see each other.

        Leave the block after the upload is committed; for a moment it then counts twice, never not at all.
        """
        account = self._account(caller.tenant)
        with account.uploads:
            self._check_upload(caller, account, num_bytes, num_adapters)
            account.pending_bytes += num_bytes
            account.pending_adapters += num_adapters
        try:
            yield
        finally:
            with account.uploads:
                account.pending_bytes -= num_bytes
                account.pending_adapters -= num_adapters

    def _check_upload(
        self, caller: Caller, account: Account, num_bytes: int, num_adapters: int
    ) -> None:
        """Caller holds account.uploads."""
        kept_bytes, kept_adapters = self._stored(caller.tenant) if self._stored else (0, 0)
        limits = caller.limits
        for kind, wanted, limit in (
            ("bytes", kept_bytes + num_bytes + account.pending_bytes, limits.max_bytes),
            ("adapters", kept_adapters + num_adapters + account.pending_adapters, limits.max_adapters),
        ):  # fmt: skip
            if limit is not None and wanted > limit:
                raise QuotaError(
                    f"this upload would make {wanted} {kind} of {limit} that the tenant may keep; "
                    "delete what is not needed or ask for a higher limit",
                    kind=kind,
                    code="insufficient_quota",
                    status=403,
                )

    # --- The ledger -----------------------------------------------------------------------------

    def usage(self, tenant: str) -> Usage:
        """What this process settled for the tenant since it started."""
        account = self._account(tenant)
        with account.lock:
            return account.total

    def take_unflushed(self) -> dict[str, Usage]:
        """What was settled since the last call, by tenant; the caller writes it down or gives it back."""
        taken = {}
        for tenant, account in self._all():
            with account.lock:
                if account.unflushed != Usage():
                    taken[tenant], account.unflushed = account.unflushed, Usage()
        return taken

    def give_back(self, taken: dict[str, Usage]) -> None:
        """The write failed: count it again next time."""
        for tenant, usage in taken.items():
            account = self._account(tenant)
            with account.lock:
                account.unflushed += usage

    def _all(self) -> list[tuple[str, Account]]:
        with self._lock:
            return list(self._accounts.items())

    def _account(self, tenant: str) -> Account:
        with self._lock:
            account = self._accounts.get(tenant)
            if account is None:
                account = self._accounts[tenant] = Account()
            return account

    def check_integrity(self) -> None:
        for tenant, account in self._all():
            with account.lock, account.uploads:
                account.requests.check_integrity()
                account.tokens.check_integrity()
                assert account.num_held >= 0, tenant
                assert min(account.pending_bytes, account.pending_adapters) >= 0, tenant


def _check_size(tokens: int, limits: Limits) -> None:
    limit = limits.tokens_per_minute
    if limit is not None and tokens > limit:
        raise QuotaError(
            f"this request may use {tokens} tokens, more than the {limit} that the tenant may use in a minute; "
            "shorten the prompt or lower max_tokens",
            kind="tokens",
            code="request_too_large",
            status=400,
        )


def _check_minute(account: Account, limits: Limits, tokens: int, now: float) -> None:
    """Caller holds the account's lock."""
    for kind, window, amount, limit in (
        ("requests", account.requests, 1, limits.requests_per_minute),
        ("tokens", account.tokens, tokens, limits.tokens_per_minute),
    ):
        if limit is not None and not window.fits(amount, limit, now):
            wait = window.wait_s(amount, limit, now)
            raise _over(kind, limit, wait, _headers(account, limits, now))


def _check_held(account: Account, limits: Limits, now: float) -> None:
    """Caller holds the account's lock."""
    limit = limits.max_concurrency
    if limit is not None and account.num_held >= limit:
        raise _over("concurrency", limit, BUSY_RETRY_S, _headers(account, limits, now))


def _over(kind: str, limit: int, wait: float | None, headers: dict[str, str]) -> QuotaError:
    per = "at a time" if kind == "concurrency" else "per minute"
    what = "requests" if kind == "concurrency" else kind
    wait = BUSY_RETRY_S if wait is None else wait
    seconds = max(1, math.ceil(wait))
    return QuotaError(
        f"the tenant's limit of {limit} {what} {per} is reached; try again in {seconds} s",
        kind=kind,
        retry_after_s=wait,
        headers={"Retry-After": str(seconds), **headers},
    )


def _headers(account: Account, limits: Limits, now: float) -> dict[str, str]:
    """As OpenAI names them. Caller holds the account's lock."""
    out = {}
    for kind, window, limit in (
        ("requests", account.requests, limits.requests_per_minute),
        ("tokens", account.tokens, limits.tokens_per_minute),
    ):
        if limit is not None:
            out[f"x-ratelimit-limit-{kind}"] = str(limit)
            out[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - window.used(now)))
            out[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(window.reset_s(now))}s"
    return out
