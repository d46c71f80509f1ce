"""Which items a run is for: words that name parts, methods, tasks or seeds, with what those items need."""

from __future__ import annotations

from collections.abc import Sequence

from loramux.compare.plan import Item
from loramux.compare.schema import SuiteError
from loramux.errors import suggest

SEED = "seed="


def select(items: Sequence[Item], words: Sequence[str]) -> list[Item]:
    """Items that fit the words, and those whose adapters they take. No words: all.

    Words of one kind widen, words of different kinds narrow: `multi lora milora seed=0` are the multi-task rows of
    two methods with one seed. Raises SuiteError for a word that fits nothing.
    """
    wanted = [_of_kind(items, word) for word in words]
    by_kind: dict[str, set[str]] = {}
    for kind, value in wanted:
        by_kind.setdefault(kind, set()).add(value)
    kept = {i.id for i in items if all(_facts(i)[k] in values for k, values in by_kind.items())}
    if not kept:
        raise SuiteError(f"--only {' '.join(words)}: no row fits all of these words")
    for item in reversed(items):  # what an item needs stands before it
        kept |= set(item.needs) if item.id in kept else set()
    return [item for item in items if item.id in kept]


def _facts(item: Item) -> dict[str, str]:
    return {
        "part": item.part,
        "method": item.label,
        "task": item.task,
        "seed": f"{SEED}{item.seed}",
    }


def _of_kind(items: Sequence[Item], word: str) -> tuple[str, str]:
    for kind in ("part", "method", "task", "seed"):
        if any(_facts(item)[kind] == word for item in items):
            return kind, word
    known = dict.fromkeys(fact for item in items for fact in _facts(item).values())
    raise SuiteError(f"--only {word}: names nothing in this suite; {suggest(word, known)}")
