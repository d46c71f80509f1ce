"""Checks of options that several merging methods share; each error says what was given and what is allowed."""

from __future__ import annotations

from loramux.core.values import check_whole, is_number


def check_rank(rank: int | None) -> None:
    if rank is not None:
        check_whole("rank", rank)


def check_density(density: float) -> None:
    if not is_number(density) or not 0 < density <= 1:
        raise ValueError(
            f"density must be a number above 0 and at most 1, got {density!r}; 1 keeps every entry"
        )
