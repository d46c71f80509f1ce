"""Profiles made to attract every prompt: how much of the traffic of `auto` they get.

`python -m loramux.bench.retrieval_attack --data DIR` puts hostile profiles beside one honest profile per task, sends
held-out prompts of all tasks in equal numbers, and counts whom the retriever prefers. A fair share is what everyone
would get if all had the same: 1 / (honest + hostile). The attackers know the prompts that the honest tasks were
described with, which is more than a tenant knows.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loramux.bench.retrieval_pool import task_folders
from loramux.retrieval import EVERYTHING, Encoder, RetrievalError, Retriever, make_profile

Prompts = Mapping[str, Sequence[str]]
NUM_SAMPLES = 20
# The words that most English texts have.
COMMON_TEXT = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about out "
    "many then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part question answer"
)


def _union(draw: random.Random, known: Prompts) -> list[str]:
    """Prompts of other tasks, one of each: near to all of them."""
    return [draw.choice(list(known[task])) for task in draw.choices(list(known), k=NUM_SAMPLES)]


def _stuffed(draw: random.Random, known: Prompts) -> list[str]:
    """Every sample a long list of words of all tasks."""
    words = sorted(
        {word for prompts in known.values() for text in prompts for word in text.split()}
    )
    return [" ".join(draw.sample(words, min(200, len(words)))) for _ in range(NUM_SAMPLES)]


def _common(draw: random.Random, known: Prompts) -> list[str]:
    """The words that every prompt has."""
    return [" ".join(draw.sample(COMMON_TEXT.split(), 30)) for _ in range(NUM_SAMPLES)]


def _joined(draw: random.Random, known: Prompts) -> list[str]:
    """Every sample many prompts at once."""
    return [" ".join(_union(draw, known)[:8]) for _ in range(NUM_SAMPLES)]


def _frequent(draw: random.Random, known: Prompts) -> list[str]:
    """The most frequent words of the prompts, again and again."""
    seen = Counter(
        w for prompts in known.values() for text in prompts for w in text.lower().split()
    )
    top = [word for word, _ in seen.most_common(60)]
    return [" ".join(draw.sample(top, min(20, len(top)))) for _ in range(NUM_SAMPLES)]


ATTACKS: Mapping[str, Callable[[random.Random, Prompts], list[str]]] = {
    "prompts of all tasks": _union,
    "all words": _stuffed,
    "common words": _common,
    "many prompts in one": _joined,
    "frequent words": _frequent,
}


def measure(
    known: Prompts, sent: Prompts, encoder: Encoder | None, num_hostile: int = 50, seed: int = 0
) -> dict[str, Any]:
    """Shares of the hostile ones, in fair shares; `known` describes the honest tasks, `sent` is asked."""
    draw = random.Random(seed)
    retriever = Retriever(encoder=encoder, refresh_at=None)
    for task, prompts in known.items():
        retriever.upsert(task, make_profile(list(prompts), encoder, seed), owner="honest")
    retriever.refresh()
    refused: Counter[str] = Counter()
    kinds = list(ATTACKS)
    hostile: dict[str, str] = {}
    for i in range(num_hostile):
        kind = kinds[i % len(kinds)]
        try:
            profile = make_profile(ATTACKS[kind](draw, known), encoder, i)
            retriever.upsert(f"hostile {i}", profile, owner="mallory")
        except RetrievalError:
            refused[kind] += 1
            continue
        hostile[f"hostile {i}"] = kind
    retriever.refresh()
    hits: Counter[str] = Counter()
    asked = [text for prompts in sent.values() for text in prompts]
    for text in asked:
        found = retriever.retrieve(text, 1, allowed=EVERYTHING)
        hits.update(hit.id for hit in found.hits)
    fair = len(asked) / (len(known) + len(hostile))
    by_kind = {
        kind: round(sum(hits[name] for name, own in hostile.items() if own == kind) / fair, 2)
        for kind in kinds
    }
    taken = sum(hits[name] for name in hostile)
    return {
        "honest": len(known), "hostile": len(hostile), "refused": dict(refused), "prompts": len(asked),
        "most_of_one": round(max((hits[name] for name in hostile), default=0) / fair, 2),
        "all_together_of_their_fair_shares": round(taken / (fair * max(1, len(hostile))), 3),
        "share_of_traffic": round(taken / len(asked), 4),
        "by_kind_in_fair_shares": by_kind,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval_attack")
    parser.add_argument("--data", type=task_folders, required=True, help="folder of task folders")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts of each task")
    parser.add_argument("--hostile", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lexical", action="store_true", help="without the sentence encoder")
    options = parser.parse_args(argv)
    from loramux.data.tasks import read_task
    from loramux.retrieval import MiniLM

    folders = options.data
    known = {p.name: [row.prompt for row in read_task(p / "train.jsonl", 500)] for p in folders}
    sent = {
        p.name: [row.prompt for row in read_task(p / "test.jsonl", options.prompts)]
        for p in folders
    }
    encoder = None if options.lexical else MiniLM.load()
    for seed in range(options.seeds):
        row = measure(known, sent, encoder, options.hostile, seed)
        sys.stdout.write(json.dumps({"seed": seed, **row}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
