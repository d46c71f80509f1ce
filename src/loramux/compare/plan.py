"""From a suite to the list of what has to be done: one item per row of results, each with what it costs in tokens.

All methods of a part see the same examples in the same order: the batches depend on the data and the seed only. How
many tokens that is stands in every item, and a training that saw another number is no row but a failure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.compare.budget import Counter, Fields, Matched, match_all
from loramux.compare.schema import Suite, SuiteError, Task
from loramux.recipe import DataSource, Recipe, parse_recipe

FORMAT = 1  # of rows; a new number makes all rows again
MIXED, ALL = "mixed", "all"
Work = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One row to be. id: digest of all that its results depend on, so a changed suite keeps what still holds.

    needs: ids of the items whose adapters it takes. tokens: those it trains on; search_tokens: those that a search
    reads without gradients; test_tokens: those it is measured on.
    """

    id: str
    part: str
    label: str
    task: str
    seed: int
    work: Work
    needs: tuple[str, ...] = ()
    tokens: int = 0
    test_tokens: int = 0
    search_tokens: int = 0

    @property
    def title(self) -> str:
        return f"{self.part} {self.label} {self.task} seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Items in the order they are run, and the matched method fields."""

    items: tuple[Item, ...]
    matched: Mapping[str, Matched]


class Planner:
    """Reads the data and the base's digest once, and makes items."""

    def __init__(self, suite: Suite):
        from loramux.compare.tokens import Tokens

        self.suite = suite
        counter = Counter(suite.base, suite.dtype)
        self.matched = match_all(suite, counter, counter.layers)
        self.tokens = Tokens(suite)
        self.base = digest_of(suite.base)
        self._files: dict[str, str] = {}

    def train(self, part: str, label: str, tasks: Sequence[str], seed: int, steps: int) -> Item:
        """One training and its measurement: on one task, or on several mixed."""
        import loramux

        sources = {task: self.suite.tasks[task] for task in tasks}
        fields = self.matched[label].fields
        name = self.suite.methods[label].method.name
        training = self.own_training(label)
        recipe = self.recipe({"name": name, **fields}, sources, training, seed, steps)
        work = {
            "kind": "train",
            "recipe": recipe.model_dump(mode="json", exclude_unset=True),
            # In full: a default that changes makes another result.
            "settings": loramux.config_from_dict({"name": name, **fields}).to_dict(),
        }
        task = tasks[0] if part == "single" else MIXED
        return self.item(part, label, task, seed, work, tasks, recipe=recipe)

    def own_training(self, label: str) -> Fields:
        own = self.suite.methods[label].training.model_dump(exclude_none=True)
        return {**self.suite.training.model_dump(exclude_none=True), **own}

    def recipe(
        self,
        method: Fields,
        tasks: Mapping[str, Task],
        training: Fields,
        seed: int,
        steps: int,
        rows: int | None = None,
    ) -> Recipe:
        """A job on the training rows of the tasks, one after the other; the trainer draws its batches from all."""
        suite = self.suite
        splits: dict[str, list[DataSource]] = {"train": [], "validation": []}
        for task in tasks.values():
            splits["train"].append(at_most(task.train, rows))
            splits["validation"] += [task.validation] if task.validation is not None else []
        data = {
            name: [source.model_dump(exclude_defaults=True) for source in sources]
            for name, sources in splits.items()
        }
        return parse_recipe(
            {
                "base": suite.base,
                "dtype": suite.dtype,
                "seed": seed,
                "threads": suite.threads,
                "method": method,
                "data": {**data, "sequence_len": suite.sequence_len},
                "training": {**training, "steps": steps},
            }
        )

    def item(
        self,
        part: str,
        label: str,
        task: str,
        seed: int,
        work: Work,
        tests: Sequence[str],
        *,
        needs: Mapping[str, str] | None = None,
        recipe: Recipe | None = None,
        examples: Mapping[str, DataSource] | None = None,
    ) -> Item:
        """An item of this work. `tests`: the tasks it is measured on; `needs`: adapters by the name of their task;
        `examples`: rows that a search reads at every evaluation.
        """
        suite, needs, examples = self.suite, dict(needs or {}), dict(examples or {})
        sources = {t: suite.tasks[t].test for t in tests}
        work = {
            **work,
            "base": suite.base,
            "dtype": suite.dtype,
            "tests": {t: s.model_dump(exclude_defaults=True) for t, s in sources.items()},
            "metric": suite.metric,
            "needs": needs,
        }
        tokens = 0
        if recipe is not None:
            tokens = work["tokens"] = self.tokens.of_training(recipe)
        facts = {
            "format": FORMAT,
            "part": part,
            "label": label,
            "task": task,
            "seed": seed,
            "work": _without_places(work),
            "base": self.base,
            "data": [
                self.file(s) for s in (*sources.values(), *_sources(recipe), *examples.values())
            ],
            **_own_rate(recipe),
        }
        search_tokens = 0
        if examples:
            search_tokens = work["settings"]["budget"] * self.tokens.of_rows(examples.values())
            work["search_tokens"] = search_tokens
            work["examples"] = {t: s.model_dump() for t, s in examples.items()}
        # What is not a result's business: how fast it is made, and how cost is measured.
        work |= {
            "threads": suite.threads,
            "eval_batch_size": suite.eval_batch_size,
            "decode_rounds": suite.decode_rounds,
        }
        return Item(
            id=digest(facts)[:16],
            part=part,
            label=label,
            task=task,
            seed=seed,
            work=work,
            needs=tuple(needs.values()),
            tokens=tokens,
            test_tokens=sum(self.tokens.of_test(t) for t in tests),
            search_tokens=search_tokens,
        )

    def file(self, source: DataSource) -> list[Any]:
        """The rows a source stands for: digest of its file (a hub dataset's name), and which rows of it."""
        from loramux.data.sources import locate

        place = locate(source)
        key = str(place)
        if key not in self._files:
            is_file = isinstance(place, Path)
            self._files[key] = (
                hashlib.sha256(place.read_bytes()).hexdigest() if is_file else key  # type: ignore[union-attr]
            )
        return [self._files[key], source.skip, source.rows, source.task]


def make_plan(suite: Suite) -> Plan:
    """Every item of the suite, seed by seed, so that a run that is stopped early has whole comparisons.

    Raises SuiteError where the budget cannot be met, and DataError where data is missing: before anything runs.
    """
    from loramux.compare.fusion import fusion_items, seeds_of_fusion

    planner = Planner(suite)
    items: dict[str, Item] = {}
    fusion_seeds = seeds_of_fusion(suite)
    most = [len(fusion_seeds), *(len(suite.seeds_of(label)) for label in suite.methods)]
    for at in range(max(most)):
        fused = [i for s in fusion_seeds[at : at + 1] for i in fusion_items(planner, s)]
        for item in [*_multi(planner, at), *_single(planner, at), *fused]:
            items.setdefault(item.id, item)
    for part in ("multi", "single", "fusion"):
        tokens_of(items.values(), part)
    return Plan(tuple(items.values()), planner.matched)


def tokens_of(items: Iterable[Item], part: str) -> dict[str, list[int]]:
    """Task -> the numbers of tokens that trainings of this part see, one for each seed; raises where methods differ."""
    found: dict[str, dict[int, int]] = {}
    for item in items:
        if item.part != part or not item.tokens:
            continue
        known = found.setdefault(item.task, {}).setdefault(item.seed, item.tokens)
        if known != item.tokens:
            raise SuiteError(
                f"{item.title} would train on {item.tokens:,} tokens and others of its part on {known:,}; "
                "all trainings of a part must see the same"
            )
    return {task: list(by_seed.values()) for task, by_seed in found.items()}


def _single(planner: Planner, at: int) -> list[Item]:
    suite = planner.suite
    if suite.single is None:
        return []
    return [
        planner.train("single", label, [task], suite.seeds_of(label)[at], suite.single.steps)
        for label in suite.single.methods or suite.methods
        if at < len(suite.seeds_of(label))
        for task in suite.single.tasks or suite.tasks
    ]


def _multi(planner: Planner, at: int) -> list[Item]:
    suite = planner.suite
    if suite.multi is None:
        return []
    tasks = list(suite.multi.tasks or suite.tasks)
    return [
        planner.train("multi", label, tasks, suite.seeds_of(label)[at], suite.multi.steps)
        for label in suite.multi.methods or suite.methods
        if at < len(suite.seeds_of(label))
    ]


def digest(value: Any) -> str:
    from loramux.formats.jsonio import canonical_json

    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_of(base: str) -> str:
    """Digest of the base's weights; a hub id that is not here yet counts by its name."""
    from loramux.fetch import resolve_base
    from loramux.formats.digest import base_digest
    from loramux.persist.base import checkpoint_folder

    folder = checkpoint_folder(str(resolve_base(base)))
    return base if folder is None else base_digest(folder)


def at_most(source: DataSource, rows: int | None) -> DataSource:
    if rows is None:
        return source
    least = rows if source.rows is None else min(rows, source.rows)
    return source.model_copy(update={"rows": least})


def _sources(recipe: Recipe | None) -> list[DataSource]:
    return [] if recipe is None else [*recipe.data.train, *recipe.data.validation]


def _own_rate(recipe: Recipe | None) -> Fields:
    """The learning rate of a training that takes its method's default."""
    if recipe is None or recipe.training.learning_rate is not None:
        return {}
    (job,) = recipe.jobs_resolved()
    return {"learning_rate": job.training.learning_rate}


def _without_places(work: Work) -> Work:
    """The work without paths and threads: files and bases count by their content, wherever they lie.

    Options as given are left out too, beside the settings that they complete to.
    """
    kept = {k: v for k, v in work.items() if k not in ("base", "tests", "options")}
    if "recipe" in kept:
        skipped = ("base", "threads", "data")
        kept["recipe"] = {k: v for k, v in kept["recipe"].items() if k not in skipped}
    return kept
