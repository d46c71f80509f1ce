"""Ways to put trained adapters together, by table: which are compared, and what each of them needs.

One set of adapters per seed, an adapter for each task, trained alone and frozen. A way is the base or one adapter as
it is, a merge into one static adapter, a router without training, or gates that learn from a few rows of every task.
`oracle` takes for each task the adapter of that task; its rows are those of the single-task trainings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loramux.compare.schema import Fusion, Suite, SuiteError

if TYPE_CHECKING:
    from loramux.compare.plan import Item, Planner

PART, ORACLE, ONLY = "fusion", "oracle", "only-"


@dataclass(frozen=True)
class Way:
    """title: what it does. name: of the merger or method behind it, "" where there is none."""

    title: str
    kind: Literal["base", "each", "oracle", "merge", "route", "learn"]
    name: str = ""


WAYS: dict[str, Way] = {
    "base": Way("the bare base", "base"),
    "each": Way("each adapter alone, on all tasks", "each"),
    ORACLE: Way("for each task the adapter of that task", "oracle"),
    "linear": Way("mean of the products", "merge", "linear"),
    "task_arithmetic": Way("sum of the products", "merge", "task_arithmetic"),
    "cat": Way("concatenation, exact", "merge", "cat"),
    "svd": Way("nearest product of the adapters' rank", "merge", "svd"),
    "ties": Way("TIES on the products", "merge", "ties"),
    "dare_linear": Way("DARE, then linear", "merge", "dare_linear"),
    "dare_ties": Way("DARE, then TIES", "merge", "dare_ties"),
    "loralego": Way("LoRA-LEGO: clusters of ranks", "merge", "loralego"),
    "lorahub": Way("LoraHub: weights by search, from a few rows", "merge", "lorahub"),
    "arrow": Way("Arrow: routes by the adapters' own directions", "route", "arrow"),
    "mole": Way("MoLE: learned gates", "learn", "mole"),
    "loraflow": Way("LoRA-Flow: learned gates per token and layer", "learn", "loraflow"),
    "xlora": Way("X-LoRA: learned scalings per token, layer and adapter", "learn", "xlora"),
}
LEARNS_FROM_ROWS = frozenset({"lorahub"})  # merges that look at training rows


def absence(way: Way) -> str | None:
    """Why a way cannot be run here; None if it can."""
    if way.kind == "merge" and way.name not in _mergers():
        return f"there is no merging method {way.name!r}"
    if way.kind in ("route", "learn") and way.name not in _methods():
        return f"there is no method {way.name!r}"
    return None


def absent_ways(suite: Suite) -> dict[str, str]:
    """The ways that the suite asks for and that are not there, with the reason."""
    if suite.fusion is None:
        return {}
    return {name: why for name in _wanted(suite.fusion) if (why := absence(WAYS[name])) is not None}


def seeds_of_fusion(suite: Suite) -> tuple[int, ...]:
    if suite.fusion is None:
        return ()
    if suite.single is None:
        raise SuiteError(
            "fusion: takes single-task adapters; add the part `single` (its steps are theirs)"
        )
    return suite.fusion.seeds or suite.seeds_of(suite.fusion.adapters)


def fusion_items(planner: Planner, seed: int, absent: Mapping[str, str]) -> list[Item]:
    """The items of one seed, the trainings of its adapters first."""
    suite = planner.suite
    fusion, single = suite.fusion, suite.single
    assert fusion is not None and single is not None
    trained = {
        task: planner.train("single", fusion.adapters, [task], seed, single.steps)
        for task in fusion.tasks or suite.tasks
    }
    needs = {task: item.id for task, item in trained.items()}
    items = list(trained.values())
    for name, options in _wanted(fusion).items():
        if name not in absent:
            items += _items(planner, fusion, name, options, needs, seed)
    return items


def _wanted(fusion: Fusion) -> dict[str, dict[str, Any]]:
    return fusion.methods or {name: {} for name in WAYS}


def _items(
    planner: Planner,
    fusion: Fusion,
    name: str,
    options: Mapping[str, Any],
    needs: Mapping[str, str],
    seed: int,
) -> list[Item]:
    from loramux.compare.plan import ALL

    way, tasks = WAYS[name], list(needs)
    sources = {task: planner.suite.tasks[task] for task in tasks}
    if way.kind == "oracle":
        return []
    if way.kind == "base":
        return [planner.item(PART, name, ALL, 0, {"kind": "score"}, tasks)]
    if way.kind == "each":
        return [
            planner.item(PART, ONLY + t, ALL, seed, {"kind": "score"}, tasks, needs={t: needs[t]})
            for t in tasks
        ]
    fields = {key: value for key, value in options.items() if key != "training"}
    if way.kind == "learn":
        training = planner.suite.training.model_dump(exclude_none=True)
        training.pop("learning_rate", None)
        if fusion.learning_rate is not None:
            training["learning_rate"] = fusion.learning_rate
        training |= dict(options.get("training", {}))
        # The names stand for the adapters' folders until the item is carried out.
        method = {"name": way.name, "adapters": tasks, **fields}
        recipe = planner.recipe(method, sources, training, seed, fusion.steps, fusion.rows)
        learn = {"kind": "train", "recipe": recipe.model_dump(mode="json", exclude_unset=True)}
        return [planner.item(PART, name, ALL, seed, learn, tasks, needs=needs, recipe=recipe)]
    kind = "compose" if way.kind == "merge" else "route"
    work: dict[str, Any] = {"kind": kind, "way": way.name, "options": fields, "seed": seed}
    if name in LEARNS_FROM_ROWS:
        work["examples"] = {
            t: planner.suite.tasks[t].train.model_copy(update={"rows": fusion.rows}).model_dump()
            for t in tasks
        }
    return [planner.item(PART, name, ALL, seed, work, tasks, needs=needs)]


def compose(work: Mapping[str, Any], adapters: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Merge the adapters into one folder; what the merge says of itself: weights, ranks, and what cutting them lost."""
    from loramux.compose.run import compose_adapters

    more: dict[str, Any] = {}
    if "examples" in work:
        from loramux.eval.loading import load_model

        more["base"] = load_model(work["base"], dtype=work["dtype"], threads=work["threads"])
        more["data"] = [source["path"] for source in work["examples"].values()]
        more["rows"] = min(source["rows"] for source in work["examples"].values())
    made = compose_adapters(
        work["way"],
        list(adapters.values()),
        out,
        seed=work["seed"],
        **more,
        **work["options"],
    )
    return {name: made[name] for name in ("weights", "rank", "error")}


def route(work: Mapping[str, Any], adapters: Mapping[str, str], out: Path) -> dict[str, Any]:
    """A router over the adapters that needs no training, saved as it is."""
    import loramux
    from loramux.eval.loading import load_model

    loaded = load_model(work["base"], dtype=work["dtype"], threads=work["threads"])
    method = {"name": work["way"], "adapters": list(adapters.values()), **work["options"]}
    loramux.attach(loaded.model, loramux.config_from_dict(method)).save(out)
    return {}


def _mergers() -> list[str]:
    try:
        from loramux.compose.mergers import merger_names
    except ImportError:
        return []
    return list(merger_names())


def _methods() -> list[str]:
    from loramux.methods import method_names

    return method_names()
