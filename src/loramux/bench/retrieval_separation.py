"""Which score tells prompts with an adapter from prompts without one, once neither has its instruction.

`python -m loramux.bench.retrieval_abstain --scores ...` prints it. Per score the area under the ROC curve, and what a
threshold on it refuses that is chosen on the test prompts themselves to refuse a tenth of the bare prompts with an
adapter of their own: the best case, no calibration reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loramux.bench.retrieval_pool import WEIGHTS, spread
from loramux.retrieval.calibrate import separation
from loramux.retrieval.encoder import Encoder
from loramux.retrieval.profile import make_profile
from loramux.retrieval.rank import hybrid
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.text import Floats

REFUSED = 0.1
GROUPS = ("own", "own, bare", "masked, bare", "foreign", "foreign, bare")
Prompts = Mapping[str, Sequence[str]]
Forms = Callable[[str, Sequence[str]], Mapping[str, Sequence[str]]]


class Remembering:
    """An encoder that reads every text once: seeds and scores share most of them."""

    def __init__(self, encoder: Encoder) -> None:
        self.id, self.dim, self._encoder = encoder.id, encoder.dim, encoder
        self._known: dict[str, Floats] = {}

    def encode(self, texts: Sequence[str]) -> Floats:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, self._encoder.encode(new), strict=True))
        return np.stack([self._known[text] for text in texts])


def measure(
    train: Prompts, sent: Prompts, adapters: Sequence[str], encoder: Encoder, forms: Forms, seed: int = 0
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Per score the figures of its column. forms: a task's prompts as they are ("") and bare (", bare")."""
    retriever = Retriever(encoder=encoder, refresh_at=None)
    for task in adapters:
        retriever.upsert(task, make_profile(list(train[task]), encoder, seed), owner=task)
    retriever.refresh()
    best: dict[str, dict[str, list[float]]] = {s: {g: [] for g in GROUPS} for s in WEIGHTS}
    everyone = frozenset(adapters)
    for task, prompts in sent.items():
        for form, texts in forms(task, prompts).items():
            for text in texts:
                groups = {("own" if task in everyone else "foreign") + form: everyone}
                if task in everyone and form:
                    groups["masked" + form] = everyone - {task}
                for group, ids in groups.items():
                    for score, value in _best(retriever, text, ids).items():
                        best[score][group].append(value)
    return {score: _figures(own) for score, own in best.items()}


def _best(retriever: Retriever, text: str, ids: frozenset[str]) -> dict[str, float]:
    scored = retriever.index.search(retriever.query(text), ids=ids)
    return {name: float(hybrid(scored, weight).max()) for name, weight in WEIGHTS.items()}


def _figures(best: Mapping[str, Sequence[float]]) -> dict[str, float]:
    limit = float(np.quantile(best["own, bare"], REFUSED, method="lower"))
    shares = {group: float(np.mean(np.array(best[group]) < limit)) for group in GROUPS}
    return {
        "auc": separation(best["own"], best["foreign"]),
        "auc, bare": separation(best["own, bare"], best["foreign, bare"]),
        "auc masked, bare": separation(best["own, bare"], best["masked, bare"]),
        **{f"refused {group}": share for group, share in shares.items()},
    }


def table(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Markdown: areas as they are, shares in percent, mean and deviation over the seeds."""
    names = list(next(iter(rows[0].values())))
    lines = [f"| score | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for score in rows[0]:
        cells = [_cell([row[score][name] for row in rows], name) for name in names]
        lines.append(f"| {score} | {' | '.join(cells)} |")
    return lines


def _cell(values: Sequence[float], name: str) -> str:
    return spread(values, 3) if name.startswith("auc") else spread([100 * v for v in values])


def run(
    train: Prompts, sent: Prompts, adapters: Sequence[str], encoder: Encoder, forms: Forms, seeds: int
) -> list[Any]:  # fmt: skip
    """A row per draw of the samples."""
    once = Remembering(encoder)
    return [measure(train, sent, adapters, once, forms, seed) for seed in range(seeds)]
