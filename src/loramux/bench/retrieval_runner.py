"""Answers test rows under sets of adapters: all adapters attached as one of summed rank, with weights per request.

Why stacked: a Mixture of k adapters is the stack with 1/k on their ranks and 0 on all others, so rows under different
sets share a batch. The bare base is all zeros, a single adapter a single one.

Letters: Q requests, R rank rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import loramux
from loramux.bench.retrieval_pool import Pool
from loramux.data.tasks import TaskRow
from loramux.eval.encode import encode_choices, encode_question
from loramux.eval.generation import greedy, matches, pad_token
from loramux.eval.loading import load_model
from loramux.eval.ranking import choice_scores
from loramux.retrieval.fusing import fuse

if TYPE_CHECKING:
    from loramux.bench.retrieval_scores import Case

BATCH = 16
NEW_TOKENS = 24
Result = tuple["Case", str, float]


class Runner:
    """The base with the stack attached."""

    def __init__(self, pool: Pool, base: str) -> None:
        loaded = load_model(base)
        self.pool, self.model, self.tokenizer = pool, loaded.model, loaded.tokenizer
        with tempfile.TemporaryDirectory() as scratch:
            folder, self.ranks = _stacked(list(pool.folders.values()), Path(scratch) / "stack")
            self.handle = loramux.load(self.model, folder, name="stack", check_base=False)

    def weighted(self, cases: Sequence[Case]) -> Iterator[Result]:
        """1/k on the ranks of each case's adapters."""
        order = sorted(cases, key=lambda case: (self._row(case).choices is None, self._size(case)))
        self.handle.use("stack")
        adapter = self.handle.adapters["stack"]
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            # Ranking and generating do not share a batch.
            for kind in (False, True):
                own = [case for case in part if (self._row(case).choices is None) is kind]
                if own:
                    with self.handle.masking(self._masks(own), adapter.name):
                        yield from self._answered(own)

    def fused(self, groups: Mapping[tuple[str, ...], Sequence[Case]]) -> Iterator[Result]:
        """Each set as the one adapter that Fusion makes of it."""
        for ids, cases in sorted(groups.items()):
            with tempfile.TemporaryDirectory() as scratch:
                folder = fuse([self.pool.folders[id] for id in ids], Path(scratch) / "fused")
                self.handle.load(folder, "fused", check_base=False)
            self.handle.use("fused")
            for kind in (False, True):
                own = [case for case in cases if (self._row(case).choices is None) is kind]
                for start in range(0, len(own), BATCH):
                    yield from self._answered(own[start : start + BATCH])
            self.handle.use(None)
            self.handle.remove("fused")

    def _answered(self, cases: Sequence[Case]) -> list[Result]:
        rows = [self._row(case) for case in cases]
        if rows[0].choices is None:
            return self._generated(cases, rows)
        coded = [encode_choices(row, self.tokenizer) for row in rows]
        scored = choice_scores(self.model, coded, pad_token_id=pad_token(self.tokenizer))
        hits = [
            (row.choices or ())[scores.best("token")] == row.answer
            for row, scores in zip(rows, scored, strict=True)
        ]
        return [(case, "token", float(hit)) for case, hit in zip(cases, hits, strict=True)]

    def _generated(self, cases: Sequence[Case], rows: Sequence[TaskRow]) -> list[Result]:
        prompts = [encode_question(row, self.tokenizer) for row in rows]
        made = greedy(
            self.model, self.tokenizer, prompts, max_new_tokens=NEW_TOKENS, first_line_only=True
        )
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]
        return [
            (case, "exact_match", float(matches(text, row.answer)))
            for case, row, text in zip(cases, rows, texts, strict=True)
        ]

    def _masks(self, cases: Sequence[Case]) -> dict[str, torch.Tensor]:
        names = list(self.pool.folders)
        weights = torch.zeros(len(cases), len(names))
        for q, case in enumerate(cases):
            for id in case.ids:
                weights[q, names.index(id)] = 1.0 / len(case.ids)
        return {
            path: weights.repeat_interleave(torch.tensor(ranks), dim=1)
            for path, ranks in self.ranks.items()
        }

    def _row(self, case: Case) -> TaskRow:
        return self.pool.tests[case.task][case.number][0]

    def _size(self, case: Case) -> int:
        return len(self._row(case).prompt)


def _stacked(folders: Sequence[Path], out: Path) -> tuple[Path, dict[str, list[int]]]:
    """The sum of the adapters as one of summed rank, and how many ranks of each linear are whose."""
    from loramux.compose.mergers.linear import LinearOptions, merge
    from loramux.compose.sources import parts_at, read_sources, union
    from loramux.compose.write import merged_tensors, write_folder

    sources = read_sources(folders)
    ones = [1.0] * len(sources)
    merged = {
        path: merge(parts_at(sources, path, ones), LinearOptions(), 0) for path in union(sources)
    }
    write_folder(out, merged_tensors(sources, merged), None, {"method": "stack"})
    return out, {path: [s.ranks.get(path, 0) for s in sources] for path in merged}
