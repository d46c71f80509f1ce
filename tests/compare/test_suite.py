"""A suite says what it compares: whatever is wrong with it is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest

from compare.small import raw_suite, suite
from loramux.compare import SuiteError, load_suite, parse_suite
from loramux.compare.plan import make_plan
from loramux.compare.select import select

SUITES = sorted((Path(__file__).parents[2] / "suites").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [0]}, "sedes: unknown key; did you mean 'seeds'"),
        ({"metric": "bleu"}, "metric: 'bleu' has no score per row"),
        ({"reference": "dora"}, "reference: unknown name 'dora'"),
        ({"budget": {"of": "dora"}}, "budget.of: unknown name 'dora'"),
        ({"budget": {}}, "budget: give exactly one of `of`"),
        ({"multi": None}, "nothing to compare"),
        ({"multi": {"steps": 2, "tasks": ["three"]}}, "multi.tasks: unknown name 'three'"),
        ({"multi": {"steps": 2, "methods": ["dora"]}}, "multi.methods: unknown name 'dora'"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"tasks": {"one": 3}}, "tasks.one"),
        ({"training": {"steps": 5}}, "training.steps: unknown key"),
    ],
)
def test_an_unknown_key_name_or_value_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SuiteError, match=message):
        parse_suite(raw_suite(tmp_path, **changes))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "milorra"}, r"methods.new.method.name: no method named 'milorra'"),
        ({"method": {"name": "lora", "rank": 3}}, r"methods.new.method.rank: unknown key"),
        ({"method": "lora", "match": "rank"}, r"methods.new.match: lora has no field 'rank'"),
        ({"method": "mole"}, r"methods.new: mole composes trained adapters"),
        ({"method": "lora", "training": {"steps": 9}}, r"methods.new.training.steps: unknown key"),
        (
            {"method": "lora", "training": {"micro_batch_size": 9}},
            r"micro_batch_size: unknown key",
        ),
    ],
)
def test_a_method_that_cannot_be_is_refused(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    raw = raw_suite(tmp_path)
    raw["methods"]["new"] = entry
    with pytest.raises(SuiteError, match=message):
        parse_suite(raw)


def test_a_way_of_fusing_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    fusion = {"adapters": "lora", "methods": ["linear", "averge"]}
    with pytest.raises(SuiteError, match="no way called 'averge'"):
        parse_suite(raw_suite(tmp_path, single={"steps": 1}, fusion=fusion))


def test_fusing_needs_the_part_that_trains_its_adapters(tmp_path: Path) -> None:
    checked = suite(tmp_path, fusion={"adapters": "lora", "methods": ["base"]})
    with pytest.raises(SuiteError, match="add the part `single`"):
        make_plan(checked)


def test_missing_data_is_refused_while_planning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        make_plan(suite(tmp_path, tasks={"one": "./nowhere"}))


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid(path: Path) -> None:
    checked = load_suite(path)
    assert checked.name == path.stem.replace("_", "-")


def test_words_narrow_what_is_run_and_keep_what_it_needs(tmp_path: Path) -> None:
    fusion = {"adapters": "lora", "methods": ["base", "linear"]}
    items = make_plan(suite(tmp_path, single={"steps": 1}, fusion=fusion)).items

    def titles(*words: str) -> list[tuple[str, str, str]]:
        return [(item.part, item.label, item.task) for item in select(items, words)]

    assert titles("multi", "milora", "seed=0") == [("multi", "milora", "mixed")]
    assert titles("linear") == [
        ("single", "lora", "one"),
        ("single", "lora", "two"),
        ("fusion", "linear", "all"),
    ]
    with pytest.raises(SuiteError, match="--only milorra: names nothing"):
        titles("milorra")
    with pytest.raises(SuiteError, match="no row fits"):
        titles("multi", "linear")
