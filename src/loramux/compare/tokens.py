"""How many tokens a training sees and a measurement reads, counted before anything runs.

Why counted and not measured: equal tokens are a claim about every row, and the time a suite takes follows from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from loramux.compare.schema import Suite
from loramux.recipe import DataSource, Recipe


class Tokens:
    """Counts with the base's tokenizer; each set of rows is tokenised once."""

    def __init__(self, suite: Suite):
        from transformers import AutoTokenizer

        from loramux.fetch import reading_base, resolve_base

        self.suite = suite
        with reading_base(suite.base):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                resolve_base(suite.base, dtype=suite.dtype)
            )
        self._examples: dict[str, Any] = {}
        self._tests: dict[str, int] = {}

    def of_training(self, recipe: Recipe) -> int:
        """Tokens of all steps, padding left out, each time they are seen."""
        import json
        from dataclasses import replace

        from loramux.train.run import build_job

        (job,) = recipe.jobs_resolved()
        key = json.dumps(job.data.model_dump(mode="json"), sort_keys=True)
        if key not in self._examples:
            self._examples[key] = build_job(job, self.tokenizer)
        built = replace(self._examples[key], training=job.training, seed=job.seed)
        return sum(len(built.train[i]) for batch in built.plan() for i in batch)

    def of_rows(self, sources: Iterable[DataSource]) -> int:
        """Tokens of these training rows, each read once."""
        from loramux.data import load_examples

        return sum(len(one) for source in sources for one in load_examples(source, self.tokenizer))

    def of_test(self, task: str) -> int:
        """Tokens of the test rows with all their choices; where there are none, of the questions and the answer."""
        from loramux.compare.scoring import read_test
        from loramux.data.encode import encode_answer
        from loramux.eval.encode import encode_choices, encode_question

        if task not in self._tests:
            total = 0
            for row in read_test(task, self.suite.tasks[task].test):
                if row.choices:
                    total += encode_choices(row, self.tokenizer).num_tokens
                else:
                    total += len(encode_question(row, self.tokenizer))
                    total += len(encode_answer(self.tokenizer, row.answer))
            self._tests[task] = total
        return self._tests[task]
