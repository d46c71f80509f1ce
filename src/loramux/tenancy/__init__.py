"""Who may do what, and how much: tenants, keys, quotas, audit.

The names below are imported when first used: callers, limits, quotas and the policy need no database installed.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Audit": "audit",
    "AuditError": "errors",
    "AuthError": "errors",
    "Caller": "caller",
    "ForbiddenError": "errors",
    "Limits": "caller",
    "POLICY": "policy",
    "PolicyError": "errors",
    "QuotaError": "errors",
    "Quotas": "quotas",
    "Reservation": "quotas",
    "Rule": "policy",
    "SCOPES": "caller",
    "Tenancy": "service",
    "TenancyError": "errors",
    "Weights": "weights",
    "check_routes": "policy",
    "decide": "policy",
}

__all__ = [
    "POLICY",
    "SCOPES",
    "Audit",
    "AuditError",
    "AuthError",
    "Caller",
    "ForbiddenError",
    "Limits",
    "PolicyError",
    "QuotaError",
    "Quotas",
    "Reservation",
    "Rule",
    "Tenancy",
    "TenancyError",
    "Weights",
    "check_routes",
    "decide",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return list(__all__)
