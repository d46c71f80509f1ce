"""Evaluation of retrieval: `python -m loramux.bench.retrieval --adapters DIR --data DIR --base DIR --seeds 3`.

Every measurement is a line of a JSONL file; a run that was stopped goes on where it was, and `--report` prints the
tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.bench.retrieval_pool import Pool, accuracy, accuracy_table, read_pool
from loramux.bench.retrieval_scores import ROUND, Case, Wanted, measure, summary, wanted


class Rows:
    """The results file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line]

    def add(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["stage"] == stage]

    def scores(self) -> dict[Any, float]:
        """What is known, by the key of its case."""
        found = {}
        for row in self.of("score"):
            case = Case(row["task"], row["number"], row["way"], tuple(row["ids"]))
            found[case.key] = float(row["value"])
        return found


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    from loramux.retrieval.encoder import MiniLM

    rows = Rows(options.out)
    pool = read_pool(options.adapters, options.data, options.prompts, MiniLM.load())
    _accuracy(pool, options.seeds, rows)
    _say(accuracy_table(rows.of("accuracy")))
    parts: list[list[Wanted]] = []
    for start in range(0, options.rows, ROUND):
        part = wanted(pool, range(options.seeds), start, min(start + ROUND, options.rows))
        cases = [case for each in part for own in each.cases.values() for case in own]
        if options.report and any(case.key not in rows.scores() for case in cases):
            break
        measure(pool, str(options.base), cases, rows.scores(), rows)
        parts.append(part)
        if not options.report:
            _say([f"test rows 1 to {start + ROUND}:", *summary(parts, rows.scores(), pool.tasks)])
    if options.report and parts:
        _say([f"first {len(parts) * ROUND} test rows:", *summary(parts, rows.scores(), pool.tasks)])
    return 0


def _accuracy(pool: Pool, seeds: int, rows: Rows) -> None:
    done = {row["seed"] for row in rows.of("accuracy")}
    for seed in range(seeds):
        if seed not in done:
            for row in accuracy(pool, seed):
                rows.add(row)


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.flush()


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.retrieval", description=__doc__)
    parser.add_argument(
        "--adapters", type=Path, required=True, help="folder of PEFT folders, named by their tasks"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of tasks: TASK/train.jsonl, TASK/test.jsonl",
    )
    parser.add_argument("--base", required=True, help="the base model")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the 20 samples (default 3)")
    parser.add_argument(
        "--prompts", type=int, default=50, help="test prompts per task to retrieve for (default 50)"
    )
    parser.add_argument(
        "--rows", type=int, default=16, help="test rows per task to answer (default 16)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("retrieval.jsonl"),
        help="results file, continued if it exists",
    )
    parser.add_argument("--report", action="store_true", help="only print what is there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
