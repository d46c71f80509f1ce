"""How often retrieval finds nothing where it should find something, and the other way round.

    python -m loramux.bench.retrieval_abstain --adapters DIR --data DIR [--seeds 3] [--prompts 50] [--scores]

Thresholds: the fixed fallback, and those calibrated from the profiles for 5 % of wrong refusals, on prompts with their
instruction, without it, and either. Prompts: of tasks whose adapter is there, of the same tasks with it masked, and of
the tasks without an adapter; as they are and without their instruction, which is what all prompts of a task begin
with. By words alone: thresholds are lexical scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loramux.bench.retrieval_pool import TRAIN_ROWS, spread, task_folders
from loramux.data.tasks import read_task
from loramux.retrieval.calibrate import FALLBACK, AbstainAt, Written
from loramux.retrieval.profile import make_profile
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.where import EVERYTHING

KINDS: tuple[Written, ...] = ("with", "without", "either")
MIN_INSTRUCTION = 3  # words; fewer are how people begin a sentence
GROUPS = ("own", "own, bare", "masked", "masked, bare", "foreign", "foreign, bare")
Prompts = Mapping[str, Sequence[str]]


def instruction_of(prompts: Sequence[str]) -> int:
    """How many words all of them begin with; 0 if they are too few for an instruction."""
    texts = [prompt.split() for prompt in prompts]
    number = 0
    while all(len(t) > number for t in texts) and len({t[number] for t in texts}) == 1:
        number += 1
    return number if number >= MIN_INSTRUCTION else 0


def bare(prompts: Sequence[str], words: int) -> list[str]:
    """The prompts without their first words; nothing of those that have no others, or no instruction."""
    cut = [" ".join(prompt.split()[words:]) for prompt in prompts] if words else []
    return [text for text in cut if text]


def measure(
    train: Prompts, sent: Prompts, adapters: Sequence[str], seed: int = 0, rate: float = 0.05
) -> dict[str, Any]:
    """Shares of each group that find nothing, by threshold, and how often the own adapter comes first."""
    retriever = Retriever(refresh_at=None)
    for task in adapters:
        retriever.upsert(task, make_profile(list(train[task]), None, seed), owner=task)
    retriever.refresh()
    best: dict[str, list[float]] = {group: [] for group in GROUPS}
    first: dict[str, list[bool]] = {"own": [], "own, bare": []}
    for task, prompts in sent.items():
        forms = {"": prompts, ", bare": bare(prompts, instruction_of(train[task][:100]))}
        for form, texts in forms.items():
            for text in texts:
                hit = retriever.retrieve(text, 1, allowed=EVERYTHING).hits[0]
                if task not in adapters:
                    best["foreign" + form].append(hit.lexical)
                    continue
                best["own" + form].append(hit.lexical)
                first["own" + form].append(hit.id == task)
                other = retriever.retrieve(text, 1, allowed=EVERYTHING, masked={task}).hits[0]
                best["masked" + form].append(other.lexical)
    limits = {"fixed": FALLBACK}
    for kind in KINDS:
        retriever = Retriever(retriever.index, min_score=AbstainAt(rate, kind), refresh_at=None)
        limits[kind] = retriever.threshold() or 0.0
    return {
        "seed": seed, "rate": rate, "adapters": len(adapters), "prompts": {g: len(v) for g, v in best.items()},
        "first": {group: round(fmean(values), 4) for group, values in first.items() if values},
        "thresholds": {
            name: {"min_score": round(limit, 4)}
            | {g: round(fmean(v < limit for v in values), 4) for g, values in best.items() if values}
            for name, limit in limits.items()
        },
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: per threshold the shares that find nothing in percent, mean and deviation over the seeds."""
    groups = [group for group in GROUPS if group in rows[0]["thresholds"]["fixed"]]
    lines = [f"| threshold | value | {' | '.join(groups)} |", "| --- " * (len(groups) + 2) + "|"]
    for name in rows[0]["thresholds"]:
        own = [row["thresholds"][name] for row in rows]
        cells = [spread([one["min_score"] for one in own], 3)]
        cells += [spread([100 * one[group] for one in own]) for group in groups]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first = {g: spread([100 * row["first"][g] for row in rows]) for g in rows[0]["first"]}
    shares = ", ".join(f"{group} {share} %" for group, share in first.items())
    return [*lines, "", f"own adapter first: {shares}"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval_abstain")
    parser.add_argument("--adapters", type=Path, required=True, help="folder of adapters by task")
    parser.add_argument("--data", type=task_folders, required=True, help="folder of task folders")
    parser.add_argument("--prompts", type=int, default=50, help="test prompts of each task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.05, help="of wrong refusals, as calibrated")
    parser.add_argument(
        "--scores", action="store_true", help="compare the lexical, dense and hybrid score instead"
    )
    options = parser.parse_args(argv)
    folders = options.data
    adapters = [p.name for p in folders if (options.adapters / p.name).is_dir()]
    train = {p.name: _read(p / "train.jsonl", TRAIN_ROWS) for p in folders}
    sent = {p.name: _read(p / "test.jsonl", options.prompts) for p in folders}
    if options.scores:
        return _scores(train, sent, adapters, options.seeds)
    rows = [measure(train, sent, adapters, s, options.rate) for s in range(options.seeds)]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.write("\n".join(table(rows)) + "\n")
    return 0


def _scores(train: Prompts, sent: Prompts, adapters: Sequence[str], seeds: int) -> int:
    """How well each score tells prompts with an adapter from others."""
    from loramux.bench import retrieval_separation
    from loramux.retrieval.encoder import MiniLM

    def forms(task: str, prompts: Sequence[str]) -> dict[str, Sequence[str]]:
        return {"": prompts, ", bare": bare(prompts, instruction_of(train[task][:100]))}

    rows = retrieval_separation.run(train, sent, adapters, MiniLM.load(), forms, seeds)
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.write("\n".join(retrieval_separation.table(rows)) + "\n")
    return 0


def _read(path: Path, rows: int) -> list[str]:
    return [row.prompt for row in read_task(path, rows)]


if __name__ == "__main__":
    sys.exit(main())
