"""The RAMoLE evaluation: one run on a tiny base that goes on where it stopped, and what its table adds up."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from compare.small import make_base
from conformance.cases import nudge
from loramux.bench.ramole import SETTINGS, Plan, Pool, main, sets_of
from loramux.bench.ramole_scales import measure as scales_of
from loramux.bench.ramole_table import table
from loramux.persist.ramole import assemble
from pico import build_pico

WORDS = {"north": "red green", "south": "salt pepper", "east": "ship harbour", "west": "tree leaf"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ramole")
    make_base(folder / "base")
    draw = random.Random(0)
    for seed, (task, words) in enumerate(WORDS.items()):
        (folder / "data" / task).mkdir(parents=True)
        for split in ("train", "test"):
            rows = []
            for at in range(14):
                own = words.split()[at % 2]
                prompt = f"{own} {chr(97 + at)} {draw.choice('xyz')}"
                rows.append({"prompt": prompt, "choices": ["up", "down"], "answer": "up"})
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / task / f"{split}.jsonl").write_text(text)
        model: Any = build_pico("llama")
        handle = loramux.attach(
            model, loramux.LoraConfig(r=2, target_modules=("q_proj", "up_proj"))
        )
        nudge(handle.adapters["default"], seed)
        handle.save(folder / "adapters" / task)
    return folder


def plan_of(root: Path, **changes: Any) -> Plan:
    return Plan(root / "adapters", root / "data", str(root / "base"), root / "out", **changes)


def test_the_command_measures_every_way_and_goes_on_where_it_stopped(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    words = [f"--{name}={root / name}" for name in ("adapters", "data", "base", "out")]
    words += ["--seeds=1", "--rows=2", "--samples=4", "--lexical"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for title in ("base, no adapter", "Selection, OOD", "RAMoLE k=3, IID", "retrieval, IID"):
        assert title in shown
    scores = root / "out" / "scores.jsonl"
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 8 * len(WORDS)
    assert all(len(row["scores"]) == 2 for row in rows)
    scores.write_text("".join(json.dumps(row) + "\n" for row in rows[:-3]))
    assert main(words) == 0
    assert capsys.readouterr().out == shown
    found = json.loads((root / "out" / "hits.json").read_text())
    for task, sets in found["ood"].items():
        assert all(len(set(ids)) == 3 and task not in ids for ids in sets)


def test_the_masked_pool_answers_as_the_assembled_set_does(root: Path):
    plan = plan_of(root)
    pool = Pool(plan)
    router = loramux.attach(
        build_pico("llama"),
        loramux.RAMoLEConfig(adapters=(plan.folder("north"), plan.folder("east"))),
    )
    for one in router.adapters["default"].routers.values():
        torch.nn.init.normal_(one.get_parameter("B_r"))
    folder = router.save(root / "router")
    pool.put(folder)
    ids = torch.tensor([[5, 17, 40, 61]])
    chosen = ["south", "west", "north"]
    pool.use(chosen)
    with torch.no_grad():
        got = pool.model(input_ids=ids).logits
    model: Any = build_pico("llama")
    parts = {task: plan.folder(task) for task in chosen}
    adapter = assemble(model, parts, folder, check_base=False, name="set")
    handle = loramux.attach(model, loramux.LoraConfig(r=2), name="other")
    handle.put(adapter)
    handle.use("set")
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_tasks_that_train_the_router_are_two_fifths_and_follow_the_seed(root: Path):
    plan = plan_of(root)
    assert plan.tasks == sorted(WORDS)
    drawn = [plan.trained_on(seed) for seed in range(6)]
    assert all(len(own) == 2 for own in drawn) and len({tuple(own) for own in drawn}) > 1
    assert drawn == [plan.trained_on(seed) for seed in range(6)]


def test_each_way_uses_its_own_part_of_what_was_found():
    found = [["b", "a", "c"], ["a", "c", "b"]]
    assert sets_of("base", "a", found) == [None, None]
    assert sets_of("oracle", "a", found) == [["a"], ["a"]]
    assert sets_of("selection", "a", found) == [["b"], ["a"]]
    assert sets_of("mixture", "a", found) == sets_of("ramole", "a", found) == found


def rows_of(way: str, setting: str, seed: int | None, scores: list[list[float]]) -> list[Any]:
    return [
        {
            "way": way,
            "setting": setting,
            "seed": seed,
            "task": f"t{i}",
            "scores": own,
            "trained": i == 0,
        }
        for i, own in enumerate(scores)
    ]


def test_a_table_counts_tasks_alike_and_pairs_rows_with_mixture():
    rows = [
        *rows_of("mixture", "iid", None, [[0, 0, 1, 1], [1]]),
        *rows_of("ramole", "iid", 0, [[1, 0, 1, 1], [1]]),
        *rows_of("ramole", "iid", 1, [[0, 0, 1, 1], [0]]),
        *rows_of("ramole", "iid", 2, [[1, 1, 1, 1]]),  # not complete: left out
    ]
    found = {setting: {"t0": [["t0", "t1"]], "t1": [["t0", "t1"]]} for setting in SETTINGS}
    shown = " ".join(table(rows, found).split())
    assert "Mixture k=3, IID 0.750" in shown
    # seeds: 0.875 and 0.25; differences per row, mean over seeds: +0.5, 0, 0, 0, -0.5
    assert "RAMoLE k=3, IID 0.562 0.250 - 0.875 +0.000 +- 0.158" in shown
    assert "own adapter first 0.500, among three 1.000, 2 rows" in shown
    assert "the router was trained with: RAMoLE 0.625, Mixture 0.500" in shown


def test_scales_are_the_sizes_of_what_goes_in_and_of_what_adapters_add(root: Path):
    pool = Pool(plan_of(root, normalise_keys=True))
    assert pool.adapter.method.config.normalise_keys  # type: ignore[attr-defined]
    found = {scale.path: scale for scale in scales_of(pool, ["red a x", "ship b"])}
    assert found.keys() == pool.adapter.routers.keys()
    assert all(s.input_most >= s.input_median > 0 and s.added_most > 0 for s in found.values())
    before = next(iter(found.values()))
    pool.adapter.rows[before.path].b.data *= 3
    after = {scale.path: scale for scale in scales_of(pool, ["red a x", "ship b"])}[before.path]
    assert after.added_most == pytest.approx(3 * before.added_most, rel=1e-3)
    assert after.input_most == pytest.approx(before.input_most), "the first linear sees the same"
