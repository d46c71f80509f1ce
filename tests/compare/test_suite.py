"""A suite says what it compares: whatever is wrong with it is refused before anything runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compare.small import raw_suite, suite
from loramux.compare import SuiteError, load_suite, parse_suite
from loramux.compare.plan import make_plan, tokens_of
from loramux.compare.select import select
from loramux.compare.ways import ways
from loramux.compose.mergers import merger_names
from loramux.compose.mergers.lorahub import LoraHubOptions
from loramux.methods.mole import MoLEConfig

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


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        (
            "ties",
            {"densty": 0.3},
            "fusion.methods.ties.densty: unknown key; did you mean 'density'",
        ),
        ("ties", {"density": "half"}, "fusion.methods.ties.density"),
        ("ties", {"density": 3.0}, "fusion.methods.ties: density"),
        ("ties", {"lam": "big"}, "fusion.methods.ties.lam: must be a finite number"),
        ("lorahub", {"lam": 0.5}, "fusion.methods.lorahub.lam: unknown key"),
        ("svd", {"seed": 3}, "fusion.methods.svd.seed: unknown key"),
        ("svd", {"training": {}}, "fusion.methods.svd.training: unknown key"),
        ("arrow", {"top_k": 9}, "fusion.methods.arrow: top_k must be in 1..2"),
        ("arrow", {"training": {}}, "fusion.methods.arrow.training: arrow is not trained"),
        ("mole", {"granulrity": "layer"}, "fusion.methods.mole.granulrity: unknown key"),
        ("mole", {"adapters": ["a", "b"]}, "fusion.methods.mole.adapters: they are those"),
        ("loraflow", {"init": "anchor:three"}, "fusion.methods.loraflow: init names the adapter"),
        ("xlora", {"training": {"steps": 9}}, "fusion.methods.xlora.training.steps: unknown key"),
        ("xlora", {"training": {"micro_batch_size": 2}}, "training.micro_batch_size: unknown key"),
        ("base", {"density": 1}, "fusion.methods.base.density: base has no options"),
    ],
)
def test_an_option_that_a_way_does_not_know_is_refused(
    tmp_path: Path, way: str, options: dict[str, Any], message: str
) -> None:
    fusion = {"adapters": "lora", "methods": {way: options}}
    with pytest.raises(SuiteError, match=message):
        parse_suite(raw_suite(tmp_path, single={"steps": 1}, fusion=fusion))


def test_the_ways_are_the_merging_methods_and_the_methods_over_adapters() -> None:
    found = ways()
    assert list(found)[:3] == ["base", "each", "oracle"]
    assert set(merger_names()) | {"arrow", "mole", "loraflow", "xlora"} <= set(found)
    assert (found["arrow"].kind, found["mole"].kind) == ("route", "learn")
    assert [name for name, way in found.items() if way.searches] == ["lorahub"]


FUSED = {"lorahub": {}, "mole": {}, "ties": {}, "arrow": {}}


def fusion_ids(folder: Path, **changes: Any) -> dict[str, str]:
    fusion = {"adapters": "lora", "methods": FUSED, "rows": 4} | changes.pop("fusion", {})
    items = make_plan(suite(folder, single={"steps": 1}, fusion=fusion, **changes)).items
    return {item.label: item.id for item in items if item.part == "fusion"}


def test_a_row_of_fusion_is_known_by_what_it_is_made_of_wherever_it_lies(tmp_path: Path) -> None:
    ids = fusion_ids(tmp_path / "here")
    assert fusion_ids(tmp_path / "there") == ids
    defaults = {
        "lorahub": {"budget": 40},
        "mole": {},
        "ties": {"lam": 1.0},
        "arrow": {"top_k": None},
    }
    assert fusion_ids(tmp_path / "here", fusion={"methods": defaults}) == ids
    fewer = fusion_ids(tmp_path / "here", fusion={"rows": 3})
    assert {label for label in ids if ids[label] != fewer[label]} == {"lorahub", "mole"}


def test_a_default_that_changes_makes_another_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = fusion_ids(tmp_path)
    monkeypatch.setattr(LoraHubOptions.__init__, "__kwdefaults__", other_defaults(LoraHubOptions))
    monkeypatch.setattr(MoLEConfig.__init__, "__kwdefaults__", other_defaults(MoLEConfig))
    changed = fusion_ids(tmp_path)
    assert {label for label in ids if ids[label] != changed[label]} == {"lorahub", "mole"}


def other_defaults(made: type[Any]) -> dict[str, Any]:
    known: dict[str, Any] = made.__init__.__kwdefaults__  # type: ignore[misc]
    name = "penalty" if made is LoraHubOptions else "router_aux_loss_coef"
    return {**known, name: 0.25}


def test_trainings_of_one_part_that_see_other_tokens_are_refused(tmp_path: Path) -> None:
    items = make_plan(suite(tmp_path)).items
    assert list(tokens_of(items, "multi")) == ["mixed"]
    other = replace(items[1], tokens=items[1].tokens + 1)
    with pytest.raises(SuiteError, match=r"multi milora mixed seed 0 would train on"):
        tokens_of([items[0], other], "multi")


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
