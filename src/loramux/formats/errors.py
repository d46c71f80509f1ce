"""The one error of this package: a folder or file that is refused.

Why a code: messages are for people and may be reworded; tests and servers tell refusals apart by `code`.
"""

from __future__ import annotations

from collections.abc import Iterable

from loramux.errors import LoramuxError

OTHER_BASE = "base_mismatch"  # the code of what was trained on another base than the one at hand


class FormatError(LoramuxError):
    """What was found, what is allowed and what to do; `code` is a stable short name of the reason."""

    def __init__(self, message: str, *, code: str = "format"):
        super().__init__(message)
        self.code = code


def listed(names: Iterable[object], limit: int = 5) -> str:
    """The first few names, escaped (they come out of files), and how many more there are."""
    all_names = list(names)
    shown = ", ".join(
        f"{name!r:.150}" if isinstance(name, str) else f"{name}" for name in all_names[:limit]
    )
    return shown + (f" and {len(all_names) - limit} more" if len(all_names) > limit else "")
