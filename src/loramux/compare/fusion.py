"""Trained adapters put together: what each way of it needs, and the doing.

One set of adapters per seed, an adapter for each task, trained alone and frozen. A way is the base or one adapter as
it is, a merge into one static adapter, a router without training, or gates that learn from a few rows of every task.
`oracle` takes for each task the adapter of that task; its rows are those of the single-task trainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.compare.schema import Fusion, Suite, SuiteError
from loramux.compare.ways import LAMBDA, Way, fields_of, own_training, settings, ways
from loramux.recipe import DataSource

if TYPE_CHECKING:
    from loramux.compare.plan import Item, Planner
    from loramux.recipe import Recipe

PART, ONLY = "fusion", "only-"
BASE_SEED = 0  # the bare base draws nothing: one row stands for every seed


def seeds_of_fusion(suite: Suite) -> tuple[int, ...]:
    if suite.fusion is None:
        return ()
    if suite.single is None:
        raise SuiteError(
            "fusion: takes single-task adapters; add the part `single` (its steps are theirs)"
        )
    return suite.fusion.seeds or suite.seeds_of(suite.fusion.adapters)


def fusion_items(planner: Planner, seed: int) -> list[Item]:
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
    known = ways()
    for name, options in (fusion.methods or {name: {} for name in known}).items():
        items += _items(planner, fusion, known[name], options, needs, seed)
    return items


def _items(
    planner: Planner,
    fusion: Fusion,
    way: Way,
    options: Mapping[str, Any],
    needs: Mapping[str, str],
    seed: int,
) -> list[Item]:
    from loramux.compare.plan import ALL, at_most

    name, tasks = way.name, list(needs)
    if way.kind == "oracle":
        return []
    if way.kind == "base":
        return [planner.item(PART, name, ALL, BASE_SEED, {"kind": "score"}, tasks)]
    if way.kind == "each":
        return [
            planner.item(PART, ONLY + t, ALL, seed, {"kind": "score"}, tasks, needs={t: needs[t]})
            for t in tasks
        ]
    work: dict[str, Any] = {"settings": settings(way, options, tasks), "seed": seed}
    if way.kind == "learn":
        recipe = _recipe(planner, fusion, way, options, tasks, seed)
        work |= {"kind": "train", "recipe": recipe.model_dump(mode="json", exclude_unset=True)}
        return [planner.item(PART, name, ALL, seed, work, tasks, needs=needs, recipe=recipe)]
    kind = "compose" if way.kind == "merge" else "route"
    work |= {"kind": kind, "way": name, "options": fields_of(options)}
    examples = {}
    if way.searches:
        examples = {t: at_most(planner.suite.tasks[t].train, fusion.rows) for t in tasks}
    return [planner.item(PART, name, ALL, seed, work, tasks, needs=needs, examples=examples)]


def _recipe(
    planner: Planner,
    fusion: Fusion,
    way: Way,
    options: Mapping[str, Any],
    tasks: Sequence[str],
    seed: int,
) -> Recipe:
    """The training of the gates. The names of the tasks stand for the adapters' folders until it is carried out."""
    training = planner.suite.training.model_dump(exclude_none=True)
    training.pop("learning_rate", None)
    if fusion.learning_rate is not None:
        training["learning_rate"] = fusion.learning_rate
    training |= own_training(way, options)
    method = {"name": way.name, "adapters": list(tasks), **fields_of(options)}
    sources = {task: planner.suite.tasks[task] for task in tasks}
    return planner.recipe(method, sources, training, seed, fusion.steps, fusion.rows)


def compose(work: Mapping[str, Any], adapters: Mapping[str, str], out: Path) -> dict[str, Any]:
    """Merge the adapters into one folder; what the merge says of itself: weights, ranks, and what cutting them lost.

    A search that finds nothing better than the base makes no adapter: then the base itself is what is measured.
    """
    from loramux.compose.run import compose_adapters
    from loramux.compose.search import NothingBetterError

    more, found = dict[str, Any](), dict[str, Any]()
    if "examples" in work:
        from loramux.eval.loading import load_model

        more["base"] = load_model(work["base"], dtype=work["dtype"], threads=work["threads"])
        more["data"] = [DataSource(**source) for source in work["examples"].values()]
        found["search_tokens"] = work["search_tokens"]
    options = dict(work["options"])
    try:
        made = compose_adapters(
            work["way"],
            list(adapters.values()),
            out,
            seed=work["seed"],
            lam=options.pop(LAMBDA, 1.0),
            options=options,
            **more,
        )
    except NothingBetterError as error:
        return found | {"weights": [0.0] * len(adapters), "note": f"scored as the base: {error}"}
    return found | {name: made[name] for name in ("weights", "rank", "error")}


def route(work: Mapping[str, Any], adapters: Mapping[str, str], out: Path) -> dict[str, Any]:
    """A router over the adapters that needs no training, saved as it is."""
    import loramux
    from loramux.eval.loading import load_model

    loaded = load_model(work["base"], dtype=work["dtype"], threads=work["threads"])
    method = {"name": work["way"], "adapters": list(adapters.values()), **work["options"]}
    loramux.attach(loaded.model, loramux.config_from_dict(method)).save(out)
    return {}
