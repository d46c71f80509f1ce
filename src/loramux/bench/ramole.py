"""RAMoLE against Selection and Mixture over the same retrieved adapters: task scores, in and out of distribution.

    python -m loramux.bench.ramole --adapters DIR --data DIR --base DIR --out DIR [--seeds 3] [--rows 25]

--adapters holds a folder per task, --data a folder per task with train.jsonl and test.jsonl. Per seed a router is
trained over 40 % of the adapters, drawn by the seed, on `--samples` rows of each of their tasks. Then the first
`--rows` test rows of every task are answered with the top 3 of all adapters (IID) and with the top 3 when the task's
own is left out (OOD), as the retriever finds them by the raw prompt. All ways answer through the same linears: one
adapter over the whole pool, masked to what a row may use. A router of zeros is Mixture, a mask with one adapter is
Selection or the oracle.

Everything is kept in --out (routers/, hits.json, scores.jsonl); the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.bench.ramole_table import table

SHARE = 0.4  # of the tasks train the router, as in the paper
TOP = 3
PROFILE_ROWS = 200  # training prompts that the 20 of a profile are drawn from
SETTINGS = ("iid", "ood")
Sets = Mapping[str, Sequence[Sequence[str]]]  # task -> per test row the adapters found


@dataclass(frozen=True)
class Plan:
    """What is measured on what. The learning rate is the best of 1e-4, 1e-3 and 3e-3 by validation loss, seed 0."""

    adapters: Path
    data: Path
    base: str
    out: Path
    seeds: int = 3
    rows: int = 25
    samples: int = 60
    learning_rate: float = 3e-3
    lexical: bool = False
    normalise_keys: bool = False

    @property
    def tasks(self) -> list[str]:
        """Those that have both an adapter and data, in order."""
        return sorted(
            folder.name
            for folder in self.adapters.iterdir()
            if (folder / "adapter_config.json").is_file()
            and (self.data / folder.name / "test.jsonl").is_file()
        )

    def trained_on(self, seed: int) -> list[str]:
        """The tasks whose adapters and rows train the router of a seed."""
        number = max(2, round(SHARE * len(self.tasks)))
        return sorted(random.Random(seed).sample(self.tasks, number))

    def folder(self, task: str) -> str:
        return str((self.adapters / task).resolve())


def train(plan: Plan, seed: int) -> Path:
    """The folder of a seed's router, trained if it is not there yet."""
    from loramux.recipe import Recipe
    from loramux.train.run import train_recipe

    tasks = plan.trained_on(seed)
    recipe = Recipe.model_validate(
        {
            "base": plan.base,
            "seed": seed,
            "method": {
                "name": "ramole",
                "adapters": [plan.folder(task) for task in tasks],
                "normalise_keys": plan.normalise_keys,
            },
            "data": {
                "train": [
                    {"path": str(plan.data / task / "train.jsonl"), "rows": plan.samples}
                    for task in tasks
                ],
                "sequence_len": 256,
            },
            "training": {
                "learning_rate": plan.learning_rate,
                "epochs": 1,
                "micro_batch_size": 8,
                "scheduler": "cosine",
                "warmup_ratio": 0.03,
                "max_grad_norm": 0.3,
            },
        }
    )
    out = plan.out / "routers" / f"seed{seed}"
    train_recipe(recipe, out, resume=True, progress=False, board=False)
    return out / "adapter"


def read_prompts(path: Path, rows: int) -> list[str]:
    from loramux.data.tasks import read_task

    return [row.prompt for row in read_task(path, rows)]


def find(plan: Plan) -> Mapping[str, Sets]:
    """iid and ood: what the retriever finds for every test row."""
    kept = plan.out / "hits.json"
    if kept.is_file():
        found: Mapping[str, Sets] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    from loramux.retrieval import MiniLM, Retriever

    retriever = Retriever(encoder=None if plan.lexical else MiniLM.load())
    for task in plan.tasks:
        samples = read_prompts(plan.data / task / "train.jsonl", PROFILE_ROWS)
        retriever.upsert(task, retriever.profile(samples), owner=task)
    retriever.refresh()
    sets: dict[str, dict[str, list[list[str]]]] = {setting: {} for setting in SETTINGS}
    pool = frozenset(plan.tasks)
    for task in plan.tasks:
        for prompt in read_prompts(plan.data / task / "test.jsonl", plan.rows):
            query = retriever.query(prompt)
            for setting in SETTINGS:
                allowed = pool - {task} if setting == "ood" else pool
                hits = retriever.retrieve(query, TOP, allowed=allowed)
                sets[setting].setdefault(task, []).append(list(hits.ids))
    kept.write_text(json.dumps(sets), encoding="utf-8")
    return sets


class Pool:
    """The base with all adapters under one router, of which any seed's can be put in."""

    def __init__(self, plan: Plan):
        import loramux
        from loramux.eval.loading import load_model

        loaded = load_model(plan.base, threads=1)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        config = loramux.RAMoLEConfig(
            adapters=tuple(plan.folder(task) for task in plan.tasks),
            normalise_keys=plan.normalise_keys,
        )
        self.handle = loramux.attach(self.model, config, name="pool")
        self.adapter = self.handle.adapters["pool"]
        self.adapter.set_trainable(False)
        self.names = dict(zip(plan.tasks, self.adapter.experts, strict=True))

    def put(self, router: Path | None) -> None:
        """A seed's router; None: the fresh one, which weighs all alike."""
        import torch

        from loramux.persist.ramole import read_router

        trained = None if router is None else read_router(router)
        for path, own in self.adapter.routers.items():
            b_r: Any = own.get_parameter("B_r")
            if trained is None:
                b_r.data = torch.zeros_like(b_r)
                continue
            tensors = {name.rpartition(".")[2]: t for name, t in trained.at(path).items()}
            own.load_state_dict(tensors)
            b_r.data = b_r.data.clone()  # a new place, so that nothing kept of the old one is used

    def use(self, chosen: Sequence[str] | None) -> None:
        """The adapters that act; None: the base alone."""
        self.handle.use(None if chosen is None else "pool")
        if chosen is not None:
            self.handle.mask_experts({own: task in chosen for task, own in self.names.items()})

    def score(self, rows: Sequence[Any], sets: Sequence[Sequence[str] | None]) -> list[float]:
        """1 or 0 for every row under its own set: token ranking, or exact match where there are no choices."""
        from loramux.eval.run import evaluate_model

        scores = [0.0] * len(rows)
        groups: dict[tuple[str, ...] | None, list[int]] = {}
        for at, chosen in enumerate(sets):
            groups.setdefault(None if chosen is None else tuple(sorted(chosen)), []).append(at)
        for chosen_key, places in groups.items():
            self.use(chosen_key)
            (result,) = evaluate_model(
                self.model,
                self.tokenizer,
                {"rows": [rows[at] for at in places]},
                metrics=["token", "exact_match"],
                batch_size=8,
                progress=False,
                per_row=True,
            )
            for at, value in zip(places, result["row_scores"], strict=True):
                scores[at] = value
        return scores

    def attention(
        self, rows: Sequence[Any], sets: Sequence[Sequence[str]], task: str
    ) -> dict[str, float]:
        """Of the weights on the first prompts: entropy over that of uniform, and the own adapter's mean share."""
        import torch

        from loramux.eval.encode import encode_question

        entropy, own = [], []
        for row, chosen in zip(rows, sets, strict=True):
            self.use(chosen)
            ids = torch.tensor([encode_question(row, self.tokenizer, "task")])
            with torch.inference_mode():
                self.model(input_ids=ids, use_cache=False)
            for record in self.handle.routing("pool"):
                p = record.gates.float()
                entropy.append(float((-(p * p.clamp_min(1e-12).log()).sum(-1)).mean()))
                own.append(float(p[:, record.columns.index(self.names[task])].mean()))
        uniform = torch.tensor(float(TOP)).log().item()
        return {"entropy": sum(entropy) / len(entropy) / uniform, "own": sum(own) / len(own)}


def ways(plan: Plan, sets: Mapping[str, Sets]) -> Iterator[tuple[str, str, int | None]]:
    """(way, setting, router seed): those that share a router come one after the other."""
    yield from (("base", "", None), ("oracle", "", None))
    for setting in SETTINGS:
        yield from (("selection", setting, None), ("mixture", setting, None))
    for seed in range(plan.seeds):
        yield from (("ramole", setting, seed) for setting in SETTINGS)


def sets_of(way: str, task: str, found: Sequence[Sequence[str]]) -> list[Sequence[str] | None]:
    """What acts on each row."""
    if way == "base":
        return [None] * len(found)
    if way == "oracle":
        return [[task]] * len(found)
    return [ids[:1] if way == "selection" else ids for ids in found]


def measure(plan: Plan) -> list[dict[str, Any]]:
    """All rows of scores.jsonl, the missing ones measured first."""
    from loramux.eval.run import read_tasks

    plan.out.mkdir(parents=True, exist_ok=True)
    found = find(plan)
    kept = plan.out / "scores.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.is_file() else []
    have = {(r["way"], r["setting"], r["seed"], r["task"]) for r in done}
    left = [
        (way, setting, seed, task)
        for way, setting, seed in ways(plan, found)
        for task in plan.tasks
        if (way, setting, seed, task) not in have
    ]
    if not left:
        return done
    files = [plan.data / task / "test.jsonl" for task in plan.tasks]
    rows_of = read_tasks(files, plan.rows)
    pool, current = Pool(plan), -1
    pool.put(None)
    for way, setting, seed, task in left:
        if seed is not None and seed != current:
            pool.put(train(plan, seed))
            current = seed
        own, hits = rows_of[task], found[setting or "iid"][task]
        sets = sets_of(way, task, hits)
        alone = [r["scores"] for r in done if (r["way"], r["task"]) == ("oracle", task)]
        is_alone = bool(alone) and all(chosen == [task] for chosen in sets)
        row: dict[str, Any] = {
            "way": way, "setting": setting, "seed": seed, "task": task,
            "scores": alone[0] if is_alone else pool.score(own, sets),
        }  # fmt: skip
        if seed is not None:
            row["trained"] = task in plan.trained_on(seed)
            if setting == "iid":
                row |= pool.attention(own[:2], hits[:2], task)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        done.append(row)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: trains, measures, prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux.bench.ramole", description=(__doc__ or "").splitlines()[0]
    )
    for name in ("adapters", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="DIR")
    parser.add_argument("--base", required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=25, help="test rows of each task")
    parser.add_argument("--samples", type=int, default=60, help="training rows of each task")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--normalise-keys", action="store_true", help="compare adapters by direction, not size"
    )
    parser.add_argument("--lexical", action="store_true", help="retrieve by words alone")
    plan = Plan(**vars(parser.parse_args(arguments)))
    if len(plan.tasks) < TOP + 1:
        parser.error(
            f"{plan.adapters} and {plan.data} share the tasks {plan.tasks}; at least {TOP + 1} are needed"
        )
    sys.stdout.write(table(measure(plan), find(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
