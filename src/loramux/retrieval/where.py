"""Which adapters a search may return: applied before anything is ranked, never afterwards.

Why a small language of its own: the same condition must run in memory and inside a vector database. A `Where` is a
conjunction of clauses, each a disjunction of (key, value) marks; an entry carries its owner, its tags and their values
as marks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

Mark: TypeAlias = tuple[str, str]
Tags: TypeAlias = Mapping[str, str | Sequence[str]]
EVERYBODY = "*"


@dataclass(frozen=True)
class Where:
    """`clauses`: every one must hold, and a clause holds if one of its marks is there. Empty: all entries."""

    clauses: tuple[tuple[Mark, ...], ...] = ()

    @classmethod
    def visible_to(cls, caller: str, base: str | None = None) -> Where:
        """Own adapters and those shared with the caller (tag `readers`), for one base (tag `base`) if given."""
        mine = (("owner", caller), ("readers", caller), ("readers", EVERYBODY))
        return cls((mine,)).tagged(base=base)

    def tagged(self, **tags: str | None) -> Where:
        """This condition and these tags; None leaves a tag out."""
        more = tuple(((key, value),) for key, value in tags.items() if value is not None)
        return Where(self.clauses + more)

    def holds(self, marks: AbstractSet[Mark]) -> bool:
        return all(any(mark in marks for mark in clause) for clause in self.clauses)


Allowed: TypeAlias = Where | AbstractSet[str] | Callable[[str], bool]
EVERYTHING = Where()


def marks_of(owner: str, tags: Tags) -> frozenset[Mark]:
    """What an entry can be found by."""
    found = {("owner", owner)}
    for key, value in tags.items():
        values = (value,) if isinstance(value, str) else value
        found.update((key, each) for each in values)
    return frozenset(found)
