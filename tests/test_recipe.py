"""A recipe says everything once, refuses what it does not know, and resolves to complete jobs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from loramux.errors import RecipeError
from loramux.recipe import (
    TextTemplate,
    dump_recipe,
    load_recipe,
    override,
    parse_recipe,
    recipe_schema,
)

BASE: dict[str, Any] = {
    "base": "some/model",
    "method": {"name": "milora", "r": 4, "top_k": 2},
    "data": {"train": [{"path": "demo:snips/train.jsonl", "rows": 10}]},
    "training": {"steps": 3},
}
RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


def with_(**changes: Any) -> dict[str, Any]:
    """The base recipe with "a__b" keys set."""
    raw = deepcopy(BASE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = raw
        for key in parents:
            target = target.setdefault(key, {})
        target[last] = value
    return raw


def written(folder: Path, raw: dict[str, Any] | str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_one_job_has_every_default() -> None:
    (job,) = parse_recipe(BASE).jobs_resolved()
    assert (job.name, job.base, job.dtype, job.seed) == ("default", "some/model", "bfloat16", 0)
    assert (job.method.name, job.method.fields) == ("milora", {"r": 4, "top_k": 2})
    assert (job.training.steps, job.training.epochs) == (3, None)
    assert job.training.learning_rate == 1e-4
    assert (job.data.sequence_len, job.data.template) == (512, "task")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainin": {}}, r"^trainin: unknown key; did you mean 'training'\? allowed: base,"),
        ({"training__learning_rte": 1}, r"^training.learning_rte: .* did you mean 'learning_rate'"),
        ({"data__train": [{"pth": "x"}]}, r"data.train.0.pth: unknown key; did you mean 'path'"),
        ({"data__template": "tsk"}, r"data.template: .*'task' or 'chat', got 'tsk'"),
        ({"data__template": {"prompt": "x"}}, r"data.template.completion: missing"),
        ({"data__template": {"prompt": "x", "completion": "{"}}, r"is not a template"),
        ({"data__template": {"prompt": "{0}", "completion": "x"}}, r"must be keys of a row"),
        ({"method__topk": 1}, r"^method.topk: unknown key; did you mean 'top_k'"),
        ({"method__gate": "hard"}, r"^method.gate: .*'ste', 'prob' or 'renorm', got 'hard'"),
        ({"method__r": "4"}, r"^method.r: .*valid integer, got '4'"),
        ({"method__top_k": 0}, r"^method: top_k must be at least 1, got 0"),
        ({"method__name": "mlora"}, r"^method.name: .*did you mean 'm[io]lora'"),
        ({"method": None}, r"^method: missing; e.g."),
        ({"training__epochs": 1}, r"exactly one of steps and epochs"),
        ({"training__steps": None}, r"exactly one of steps and epochs"),
        ({"training__learning_rate": -1}, r"training.learning_rate: .*greater than 0, got -1"),
        ({"training__eval_every": 5}, r"eval_every: needs data.validation"),
        ({"training__early_stopping_patience": 2}, r"patience: needs data.validation"),
        ({"data__train": []}, r"data.train: needs at least one source"),
        ({"dtype": "fp16"}, r"dtype: .*'bfloat16' or 'float32'"),
        ({"jobs": []}, r"jobs: the list is empty"),
        ({"jobs": [{"name": "a"}, {"name": "a"}]}, r"jobs: names must differ"),
        ({"jobs": [{"name": "../a"}]}, r"jobs.0.name: "),
        ({"jobs": [{"name": "a", "training": {"stps": 1}}]}, r"jobs.0.training.stps: unknown key"),
        (
            {"jobs": [{"name": "a", "method": {"name": "lora", "k": 1}}]},
            r"jobs.0.method.k: unknown",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_path(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(with_(**changes))


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(RecipeError, match=r"dtype: .*; training.steps: "):
        parse_recipe(with_(dtype="x", training__steps=0))


def test_jobs_start_from_the_top_level() -> None:
    raw = with_(
        training__learning_rate=0.5,
        jobs=[
            {"name": "a", "seed": 7, "method": {"top_k": 1}},
            {"name": "b", "training": {"epochs": 2}, "data": {"sequence_len": 64}},
            {"name": "c", "method": {"name": "lora"}},
        ],
    )
    a, b, c = parse_recipe(raw).jobs_resolved()
    assert (a.seed, b.seed) == (7, 0)
    assert a.method.fields == {"r": 4, "top_k": 1}
    assert (b.training.steps, b.training.epochs, b.training.learning_rate) == (None, 2, 0.5)
    assert b.data.sequence_len == 64 and b.data.train == a.data.train
    assert c.method.fields == {}, "another method does not inherit fields it may not have"


def test_no_learning_rate_means_the_methods_own() -> None:
    from loramux.methods import load_method

    for name in ("lora", "milora", "mixlora"):
        (job,) = parse_recipe(with_(method={"name": name})).jobs_resolved()
        assert job.training.learning_rate == load_method(name).default_learning_rate
    (job,) = parse_recipe(
        with_(method={"name": "lora"}, training__learning_rate=None)
    ).jobs_resolved()
    assert job.training.learning_rate == 2e-4


def test_overrides_are_yaml_and_reach_into_lists() -> None:
    raw = override(BASE, "data.train.0.rows=4")
    raw = override(raw, "training.learning_rate=1e-3")
    raw = override(raw, "method.target_modules=[q_proj, v_proj]")
    raw = override(raw, "training.steps=null")
    raw = override(raw, "training.epochs=2")
    (job,) = parse_recipe(raw).jobs_resolved()
    assert job.data.train[0].rows == 4
    assert job.training.learning_rate == 1e-3 and job.training.epochs == 2
    assert job.method.fields["target_modules"] == ["q_proj", "v_proj"]
    assert BASE["training"] == {"steps": 3}, "the original is left alone"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.steps", "must look like"),
        ("=3", "must look like"),
        ("data.train.4.rows=1", "'4' is not one of its positions 0..0"),
        ("base.x.y=1", "base is a plain value"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        override(BASE, text)


def test_an_override_of_an_unknown_key_is_refused_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yaml: training.lr: unknown key"):
        load_recipe(written(tmp_path, BASE), ["training.lr=1"])


def test_data_paths_start_at_the_recipe_even_when_shared_by_an_anchor(tmp_path: Path) -> None:
    text = """
base: some/model
method: {name: lora}
training: {steps: 1}
data: {train: &rows [{path: train.jsonl}, {path: who/hub}, {path: "demo:snips/train.jsonl"}]}
jobs:
  - {name: a, data: {train: *rows}}
"""
    (job,) = load_recipe(written(tmp_path, text)).jobs_resolved()
    paths = [source.path for source in job.data.train]
    assert paths == [str(tmp_path / "train.jsonl"), "who/hub", "demo:snips/train.jsonl"]


def test_a_base_folder_beside_the_recipe_wins_over_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert load_recipe(written(tmp_path, BASE)).base == str(tmp_path / "some" / "model")


def test_adapter_folders_of_a_method_start_at_the_recipe(tmp_path: Path) -> None:
    raw = with_(method={"name": "mole", "adapters": ["./a", "./b"]})
    (job,) = load_recipe(written(tmp_path, raw)).jobs_resolved()
    assert job.method.fields["adapters"] == [str(tmp_path / "a"), str(tmp_path / "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1", "must hold keys such as base"),
        ("base: x\nbase: y", "the key 'base' is given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"recipe.yaml: .*{message}"):
        load_recipe(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no.yaml: cannot be read"):
        load_recipe(tmp_path / "no.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    text = "base: x\nmethod: {name: milora, router_aux_loss_coef: 1e-3}\n"
    text += "data: {train: [{path: who/hub}]}\ntraining: {steps: 1}\n"
    (job,) = load_recipe(written(tmp_path, text)).jobs_resolved()
    assert job.method.fields["router_aux_loss_coef"] == 1e-3


def test_a_dumped_recipe_reads_back_the_same(tmp_path: Path) -> None:
    raw = with_(data__template={"prompt": "{a}", "completion": "{b}"}, jobs=[{"name": "one"}])
    recipe = parse_recipe(raw)
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe
    (job,) = recipe.jobs_resolved()
    (again,) = load_recipe(written(tmp_path, dump_recipe(job))).jobs_resolved()
    assert again == job
    assert job.data.template == TextTemplate(prompt="{a}", completion="{b}")


def test_the_schema_knows_every_key_and_allows_no_other() -> None:
    schema = recipe_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == {
        *("base", "dtype", "seed", "threads", "method", "data", "training", "jobs"),
        *("joint", "objective"),
    }
    assert schema["additionalProperties"] is False
    job = schema["$defs"]["JobPatch"]["properties"]
    assert {"$ref": "#/$defs/TrainingConfig"} in job["training"]["anyOf"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_complete_and_names_existing_data(path: Path) -> None:
    from loramux.data.sources import read_rows

    for job in load_recipe(path).jobs_resolved():
        for source in (*job.data.train, *job.data.validation):
            assert len(list(read_rows(source))) == source.rows
        assert job.data.validation


def test_every_method_that_learns_has_a_recipe() -> None:
    from loramux.methods import load_method, method_names

    learning = {name for name in method_names() if load_method(name).learns}
    assert {path.stem for path in RECIPES} >= {*learning, "demo"}
