"""The pool of the retrieval evaluation: one adapter per task, held-out prompts, and how often the right one is found.

IID: a prompt's own adapter is in the pool. OOD: it is masked for that prompt, a hit of the same kind of task counts.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from loramux.data.tasks import TaskRow, read_task
from loramux.retrieval.background import Query
from loramux.retrieval.calibrate import separation
from loramux.retrieval.encoder import Encoder
from loramux.retrieval.profile import make_profile
from loramux.retrieval.rank import Ranking
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.where import EVERYTHING

# Ours: which tasks look alike to a reader of their prompts. A task that is alone has no right answer once it is masked.
KINDS = {
    "numbers": ("addsub", "bbh_object_counting"),
    "intents": ("banking", "clinc", "snips"),
    "headlines": ("agnews", "clickbait"),
    "films": ("sst2", "subj"),
    "short questions": ("boolq", "trec"),
    "people": ("bbh_disambiguation_qa", "siqa"),
}
WEIGHTS = {"lexical": 0.0, "dense": 1.0, "hybrid": 0.5}
TRAIN_ROWS = 500  # the samples are drawn from these


def task_folders(text: str) -> list[Path]:
    """For argparse: the folders of tasks in a folder, by name."""
    data = Path(text)
    found = (
        sorted(p for p in data.iterdir() if (p / "train.jsonl").is_file()) if data.is_dir() else []
    )
    if not found:
        raise ArgumentTypeError(f"{text} has no folder with a train.jsonl; give a folder of tasks")
    return found


@dataclass(frozen=True)
class Pool:
    """tasks: adapters by name. train: prompts to draw samples from. tests: rows with their queries. foreign: queries of
    tasks without an adapter."""

    folders: Mapping[str, Path]
    train: Mapping[str, Sequence[str]]
    tests: Mapping[str, Sequence[tuple[TaskRow, Query]]]
    foreign: Sequence[Query]
    encoder: Encoder

    @property
    def tasks(self) -> list[str]:
        return list(self.folders)

    def retriever(self, seed: int, dense_weight: float = 0.5) -> Retriever:
        """The pool with samples drawn by this seed."""
        made = Retriever(encoder=self.encoder, ranking=Ranking(dense_weight), refresh_at=None)
        for task in self.tasks:
            profile = make_profile(self.train[task], self.encoder, seed)
            made.upsert(task, profile, owner="bench")
        made.refresh()
        return made


def read_pool(adapters: Path, data: Path, prompts: int, encoder: Encoder) -> Pool:
    """Every adapter folder that has a task of its name, and the first `prompts` test rows of each task."""
    folders = {
        path.name: path
        for path in sorted(adapters.iterdir())
        if (path / "adapter_config.json").is_file() and (data / path.name).is_dir()
    }
    others = sorted(p for p in data.iterdir() if p.is_dir() and p.name not in folders)
    train = {t: _prompts(data / t / "train.jsonl", TRAIN_ROWS) for t in folders}
    tests = {t: read_task(data / t / "test.jsonl", prompts) for t in folders}
    foreign = [text for p in others for text in _prompts(p / "test.jsonl", max(1, prompts // 2))]
    queries = {t: _queries([row.prompt for row in rows], encoder) for t, rows in tests.items()}
    pairs = {t: list(zip(tests[t], queries[t], strict=True)) for t in folders}
    return Pool(folders, train, pairs, _queries(foreign, encoder), encoder)


def _prompts(path: Path, rows: int) -> list[str]:
    return [row.prompt for row in read_task(path, rows)]


def _queries(texts: Sequence[str], encoder: Encoder) -> list[Query]:
    vectors = encoder.encode(texts)
    return [Query.of(text, vector) for text, vector in zip(texts, vectors, strict=True)]


def kin(task: str) -> tuple[str, ...]:
    """Other tasks of the same kind."""
    return tuple(t for group in KINDS.values() if task in group for t in group if t != task)


def accuracy(pool: Pool, seed: int) -> Iterator[dict[str, Any]]:
    """Shares in percent for each way of scoring, with samples drawn by this seed."""
    for name, weight in WEIGHTS.items():
        retriever = pool.retriever(seed, weight)
        cases = [(task, query) for task, rows in pool.tests.items() for _, query in rows]
        found = [retriever.retrieve(q, 3, allowed=EVERYTHING).ids for _, q in cases]
        own = [task for task, _ in cases]
        masked = [
            (retriever.retrieve(q, 3, allowed=EVERYTHING, masked={t}).ids, kin(t))
            for t, q in cases
            if kin(t)
        ]
        yield {
            "stage": "accuracy",
            "score": name,
            "seed": seed,
            "prompts": len(cases),
            "top1": 100 * fmean(ids[0] == t for ids, t in zip(found, own, strict=True)),
            "top3": 100 * fmean(t in ids for ids, t in zip(found, own, strict=True)),
            "kind1": 100 * fmean(ids[0] in near for ids, near in masked),
            "kind3": 100 * fmean(bool(set(ids) & set(near)) for ids, near in masked),
            **_abstaining(pool, retriever, name),
        }


def _abstaining(pool: Pool, retriever: Retriever, name: str) -> dict[str, float]:
    """AUC of the best score: own adapter there against masked, whole kind masked, and prompts of other tasks."""
    inside: list[float] = []
    masked: list[float] = []
    alone: list[float] = []
    for task, rows in pool.tests.items():
        for _, query in rows:
            inside.append(_best(retriever, query, name, frozenset()))
            masked.append(_best(retriever, query, name, frozenset({task})))
            alone.append(_best(retriever, query, name, frozenset({task, *kin(task)})))
    foreign = [_best(retriever, query, name, frozenset()) for query in pool.foreign]
    return {
        "auc_masked": separation(inside, masked),
        "auc_kind": separation(inside, alone),
        "auc_foreign": separation(inside, foreign),
    }


def _best(retriever: Retriever, query: Query, name: str, masked: frozenset[str]) -> float:
    hit = retriever.retrieve(query, 1, allowed=EVERYTHING, masked=masked).hits[0]
    return hit.score


def spread(values: Sequence[float], digits: int = 1) -> str:
    """mean ± deviation over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown, one line per way of scoring."""
    lines = [
        "| score | top 1 | top 3 | own masked: kind in top 1 | in top 3 | AUC masked | AUC kind masked | AUC foreign |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in WEIGHTS:
        own = [row for row in rows if row["score"] == name]
        if not own:
            continue
        shares = [spread([row[key] for row in own]) for key in ("top1", "top3", "kind1", "kind3")]
        areas = [
            spread([row[key] for row in own], 3)
            for key in ("auc_masked", "auc_kind", "auc_foreign")
        ]
        lines.append(f"| {' | '.join([name, *shares, *areas])} |")
    return lines
