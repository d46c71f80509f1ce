"""What one contributor's many profiles do to the threshold that is calibrated from a pool's profiles.

    python -m loramux.bench.retrieval_flood --data DIR [--hostile 1000] [--tasks 33] [--seeds 3]

Beside one honest adapter per task, each of a contributor of its own, `--hostile` profiles of one kind: once all of one
contributor, once each of a contributor of its own, which is what judging every adapter alike would do, and what a crowd
of accounts can still do. Counted are the honest tasks' prompts that then find nothing among the honest adapters.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loramux.bench.retrieval_abstain import bare, instruction_of
from loramux.bench.retrieval_attack import ATTACKS, NUM_SAMPLES, Prompts
from loramux.bench.retrieval_pool import TRAIN_ROWS, spread, task_folders
from loramux.retrieval.calibrate import AbstainAt
from loramux.retrieval.index import Entry
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.retriever import Retriever

KNOWN = 50  # prompts of each task that the hostile profiles are made from
NONE = "none"
Figures = dict[str, float]


def _unlike(draw: random.Random, known: Prompts) -> list[str]:
    """Samples without a word in common: none fits the others, which pulls the threshold down."""
    return [" ".join(f"{draw.random():.12f}"[2:] for _ in range(20)) for _ in range(NUM_SAMPLES)]


def _alike(draw: random.Random, known: Prompts) -> list[str]:
    """Samples that differ in one word, each of which fits the others perfectly."""
    words = " ".join(f"{draw.random():.12f}"[2:] for _ in range(30))
    return [f"{words} {number}" for number in range(NUM_SAMPLES)]


FLOODS: Mapping[str, Callable[[random.Random, Prompts], list[str]]] = {
    **ATTACKS,
    "samples all unlike": _unlike,
    "samples all alike": _alike,
}


def measure(
    train: Prompts, sent: Prompts, kind: str | None, hostile: int, seed: int = 0, rate: float = 0.05
) -> dict[str, Figures]:
    """Threshold and shares of the honest prompts that find nothing, by how the hostile profiles are owned."""
    draw = random.Random(seed)
    known = {task: list(prompts)[:KNOWN] for task, prompts in train.items()}
    honest = {task: make_profile(list(prompts), None, seed) for task, prompts in train.items()}
    made: list[Profile] = []
    if kind is not None:
        made = [make_profile(FLOODS[kind](draw, known), None, i) for i in range(hostile)]
    owners = {
        "one": ["mallory"] * len(made),
        "many": [f"mallory{i}" for i in range(len(made))],
    }
    return {
        way: figures(honest, list(zip(names, made, strict=True)), train, sent, rate)
        for way, names in owners.items()
    }


def figures(
    honest: Mapping[str, Profile],
    hostile: Sequence[tuple[str, Profile]],
    train: Prompts,
    sent: Prompts,
    rate: float = 0.05,
) -> Figures:
    """Threshold, and which of the prompts find nothing. hostile: contributors and their profiles."""
    retriever = Retriever(min_score=AbstainAt(rate), refresh_at=None, reject_central=False)
    own = [Entry(task, profile, task) for task, profile in honest.items()]
    theirs = [Entry(f"{owner}/{i}", p, owner) for i, (owner, p) in enumerate(hostile)]
    retriever.upsert_all(own + theirs)
    retriever.refresh()
    refused: dict[str, list[bool]] = {"own": [], "own, bare": []}
    for task, prompts in sent.items():
        words = instruction_of(list(train[task])[:100])
        for form, texts in (("own", prompts), ("own, bare", bare(prompts, words))):
            found = [retriever.retrieve(text, 1, allowed=honest.keys()) for text in texts]
            refused[form] += [one.abstained for one in found]
    shares = {form: fmean(values) for form, values in refused.items() if values}
    return {"threshold": retriever.threshold() or 0.0, **shares}


def table(rows: Mapping[str, Sequence[Mapping[str, Figures]]]) -> list[str]:
    """Markdown: per kind the threshold and the shares in percent, mean and deviation over the seeds."""
    names = list(next(iter(rows.values()))[0]["one"])
    ways = {"one": "of one contributor", "many": "each of its own"}
    head = [f"{way}: {name}" for way in ways.values() for name in names]
    lines = [f"| hostile profiles | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|"]
    for kind, seeds in rows.items():
        cells = [_cell(seeds, way, name) for way in ways for name in names]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def _cell(seeds: Sequence[Mapping[str, Figures]], way: str, name: str) -> str:
    values = [one[way][name] for one in seeds]
    return spread(values, 3) if name == "threshold" else spread([100 * v for v in values])


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    from loramux.data.tasks import read_task

    def read(path: Path, rows: int) -> list[str]:
        return [row.prompt for row in read_task(path, rows)]

    folders = options.data[: options.tasks]
    train = {p.name: read(p / "train.jsonl", TRAIN_ROWS) for p in folders}
    sent = {p.name: read(p / "test.jsonl", options.prompts) for p in folders}
    rows: dict[str, list[Any]] = {}
    for kind in (NONE, *FLOODS):
        asked = None if kind == NONE else kind
        for seed in range(options.seeds):
            found = measure(train, sent, asked, options.hostile, seed)
            rows.setdefault(kind, []).append(found)
            _say(json.dumps({"kind": kind, "seed": seed, **found}))
    for line in table(rows):
        _say(line)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval_flood")
    parser.add_argument("--data", type=task_folders, required=True, help="folder of task folders")
    parser.add_argument("--prompts", type=int, default=20, help="held-out prompts of each task")
    parser.add_argument("--hostile", type=int, default=1000, help="profiles of each kind")
    parser.add_argument("--tasks", type=int, help="only so many honest tasks, by name")
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
