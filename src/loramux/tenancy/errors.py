"""What tenancy refuses, each with a stable `code` and the HTTP status that means the same."""

from __future__ import annotations

from collections.abc import Mapping

from loramux.errors import LoramuxError


class TenancyError(LoramuxError):
    """Something about tenants or keys that the operator can put right."""

    code = "bad_tenancy"
    status = 400


class AuthError(TenancyError):
    """Who is calling cannot be told. One text for unknown, expired and revoked keys: a guesser learns nothing."""

    code = "invalid_api_key"
    status = 401

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status


class ForbiddenError(TenancyError):
    """The caller is known and may not do this."""

    code = "permission_denied"
    status = 403


class QuotaError(TenancyError):
    """More than the tenant may use.

    kind: requests, tokens, concurrency, bytes, adapters. retry_after_s: when the same request could pass, None where
    waiting does not help. headers: Retry-After and x-ratelimit-*, ready for the response.
    """

    code = "rate_limit_exceeded"
    status = 429

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = dict(headers or {})
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status


class PolicyError(TenancyError):
    """Routes and policy do not match: a mistake of ours that must stop the start."""

    code = "bad_policy"
    status = 500


class AuditError(TenancyError):
    """The audit log is not as it was written."""

    code = "audit_broken"
    status = 500
