"""FanLoRA from a recipe: probe, setting and placed adapters in one folder, reusable, resumable, refused elsewhere."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.core.placement import Setting
from loramux.errors import RecipeError
from loramux.methods.fanlora import FanLoRAConfig, read_setting
from loramux.recipe import Recipe, load_recipe, parse_recipe
from loramux.train import CheckpointError, Listener, StepEvent, Trainer, train_recipe
from methods.bridge import adapter_of
from methods.fanlora_case import LLAMA, batches_of, handmade, placed, probe, setting_file
from pico import build_pico, pico_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    for name, ask in (("after", "What comes after"), ("before", "What comes before")):
        rows = [
            {"prompt": f"{ask} {a}?", "completion": b, "task": name}
            for a, b in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class StopAt(Listener):
    """Interrupts the run itself, not its probe."""

    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def data(base: Path, name: str) -> dict[str, Any]:
    path = str(base.parent / f"{name}.jsonl")
    return {"train": [{"path": path, "rows": 9}], "validation": [{"path": path, "skip": 9}]}


def recipe(base: Path, **changes: Any) -> Recipe:
    method = {"name": "fanlora", "r": 2, "probe_r": 4, **changes.pop("method", {})}
    raw = {
        "base": str(base),
        "dtype": "float32",
        "method": method,
        "data": data(base, "after"),
        "training": {"steps": 5, "learning_rate": 1e-2, "micro_batch_size": 4},
    }
    return parse_recipe(raw | changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_keep": 0}, "n_keep must be at least 1"),
        ({"scorer": "guess"}, "scorer must be one of"),
        ({"per": "block"}, "per must be one of"),
        ({"setting": 3}, "setting must be the name of a file"),
        ({"scorer": "fixed"}, "give both or neither"),
        ({"keep": ("q_proj",)}, "give both or neither"),
        ({"match_r": 4, "budget": 100}, "both choose r"),
        ({"match_r": 4, "rank_pattern": {"q_proj": 2}}, "leave rank_pattern out"),
        ({"scorer": "random", "init_from_probe": True}, "no probe to start from"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FanLoRAConfig(**settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a FanLoRA setting"),
        ('{"kind": "fanlora setting", "schema_version": 9}', "schema version 9"),
        ('{"kind": "fanlora setting", "schema_version": 1}', "not a complete setting"),
    ],
)
def test_a_file_that_is_no_setting_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "setting.json"
    path.write_text(content)
    model = build_pico("llama")
    with pytest.raises(ValueError, match=message):
        loramux.attach(model, FanLoRAConfig(setting=str(path)))
    with pytest.raises(ValueError, match="cannot be read"):
        loramux.attach(model, FanLoRAConfig(setting=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_keep": "2"}, "n_keep must be an integer"),
        ({"n_keep": -1}, "n_keep must be at least 1"),
        ({"per": "zzz"}, "per must be one of"),
        ({"losses": 3}, "losses must be a dict"),
        ({"losses": {"base": "x"}}, r"losses\.base must be a finite number"),
        ({"agreement": "abc"}, "agreement must be a list"),
        ({"agreement": ["a"]}, "agreement must be a finite number"),
        ({"scorer": 3}, "scorer must be a str"),
        ({"layers": []}, "layers must hold scored linears"),
        ({"layers": [3]}, "a layer must be a dict"),
        ({"layers": [{"x": {"keep": True, "score": None}}]}, r"x\.score must be a finite number"),
        ({"layers": [{"x": {"keep": True, "score": float("nan")}}]}, r"x\.score must be a finite"),
        ({"layers": [{"x": {"keep": 1, "score": 2.0}}]}, r"x\.keep must be a bool"),
        ({"layers": [{"x": {"score": 2.0}}]}, "it has no 'keep'"),
        ({"probe": 5}, "probe must be a str"),
        ({"probe": ""}, "probe must be a folder beside the setting"),
        ({"probe": "../../../etc"}, "probe must be a folder beside the setting"),
        ({"probe": "/etc"}, "probe must be a folder beside the setting"),
    ],
)
def test_values_in_a_setting_that_are_not_what_they_should_be_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = handmade(tmp_path / "setting.json", [LLAMA[:2]] * 2)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="not a complete setting .*" + message):
        read_setting(str(path))


def test_a_setting_edited_by_hand_is_refused(tmp_path: Path) -> None:
    path = handmade(tmp_path / "setting.json", [["mlp.up_proj", "mlp.down_proj"]] * 2)
    value = json.loads(path.read_text())
    value["layers"][1]["mlp.up_proj"]["keep"] = False
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="keeps other linears than its scores say"):
        read_setting(str(path))


def test_another_n_keep_chooses_anew_from_the_same_scores(tmp_path: Path) -> None:
    _, handle, _ = probe()
    path = setting_file(tmp_path / "setting.json", handle, batches_of(3))
    _, three = placed(path, n_keep=3)
    assert len(adapter_of(three).rows) == 6
    _, spread = placed(path, n_keep=1, per="model")
    assert len(adapter_of(spread).rows) == 2
    with pytest.raises(ValueError, match="chose per layer, this config asks per model"):
        placed(path, per="model")
    with pytest.raises(ValueError, match="only 7 targeted linears"):
        placed(path, n_keep=8)


def test_fixed_and_random_placements_need_no_probe() -> None:
    fixed = loramux.attach(
        build_pico("llama"), FanLoRAConfig(scorer="fixed", keep=("q_proj", "v_proj"))
    )
    assert {path.rpartition(".")[2] for path in adapter_of(fixed).rows} == {"q_proj", "v_proj"}
    found = []
    for seed in (0, 0, 1):
        config = FanLoRAConfig(scorer="random", placement_seed=seed, n_keep=3)
        handle = loramux.attach(build_pico("llama"), config)
        found.append(sorted(adapter_of(handle).rows))
        assert len(found[-1]) == 6
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("settings", [{}, {"match_r": 4}, {"budget": 5000}])
def test_names_to_keep_that_the_model_lacks_are_refused(settings: dict[str, int]) -> None:
    config = FanLoRAConfig(scorer="fixed", keep=("q_proj", "qkv"), **settings)
    with pytest.raises(ValueError, match=r"keep names 'qkv'.* they are .*'self_attn\.q_proj'"):
        loramux.attach(build_pico("llama"), config)


def test_a_recipe_without_a_setting_makes_one_and_trains_there(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train_recipe(recipe(base), out, progress=False)
    assert (out / "probe" / "adapter").is_dir()
    value = json.loads((out / "setting.json").read_text())
    assert value["scorer"] == "ablation (reconstruction)"
    assert value["n_keep"] == 2 and value["data"]["rows"] == 6
    assert value["base"]["name"] == str(base)
    assert value["losses"]["probe"] < value["losses"]["base"]
    assert len(value["agreement"]) == 2
    setting = read_setting(str(out / "setting.json"))
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    kept = {
        f"model.layers.{n}.{name}"
        for n, layer in enumerate(setting.mask())
        for name in layer
        if layer[name]
    }
    model = build_pico("llama")
    handle = loramux.load(model, result["adapter"])
    assert set(adapter_of(handle).rows) == kept
    assert saved["r"] == 2


def test_a_setting_serves_another_task(base: Path, tmp_path: Path) -> None:
    train_recipe(recipe(base), tmp_path / "first", progress=False)
    setting = str(tmp_path / "first" / "setting.json")
    other = recipe(base, method={"setting": setting}, data=data(base, "before"))
    train_recipe(other, tmp_path / "second", progress=False)
    assert not (tmp_path / "second" / "probe").exists()
    paths = [
        set(adapter_of(loramux.load(build_pico("llama"), tmp_path / run / "adapter")).rows)
        for run in ("first", "second")
    ]
    assert paths[0] == paths[1]


def test_jobs_share_one_probe_on_the_data_of_all(base: Path, tmp_path: Path) -> None:
    jobs = [{"name": name, "data": data(base, name)} for name in ("after", "before")]
    jobs.append({"name": "plain", "method": {"name": "lora", "r": 2}})
    out = tmp_path / "run"
    result = train_recipe(recipe(base, jobs=jobs), out, progress=False)
    run = json.loads((out / "probe" / "run.json").read_text())["jobs"]["default"]
    assert [Path(s["path"]).stem for s in run["data"]["train"]] == ["after", "before"]
    assert run["method"]["name"] == "lora" and run["method"]["r"] == 4
    rows = [
        set(adapter_of(loramux.load(build_pico("llama"), job["adapter"])).rows)
        for job in result["jobs"]
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert len(rows[2]) == 14


def test_jobs_that_ask_for_different_probes_are_refused(base: Path, tmp_path: Path) -> None:
    jobs = [{"name": "one"}, {"name": "two", "method": {"probe_r": 2}}]
    with pytest.raises(RecipeError, match="different probes or scorers"):
        train_recipe(recipe(base, jobs=jobs), tmp_path / "run", progress=False)
    jobs = [{"name": "one"}, {"name": "two", "data": {"sequence_len": 64}}]
    with pytest.raises(RecipeError, match="cannot share a probe"):
        train_recipe(recipe(base, jobs=jobs), tmp_path / "run", progress=False)


def test_a_run_interrupted_at_any_stage_goes_on_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import loramux.train.probe as stage

    train_recipe(recipe(base), tmp_path / "whole", progress=False)
    made = stage._write_setting

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_write_setting", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe(base), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "setting.json").exists()
    monkeypatch.setattr(stage, "_write_setting", made)
    probe_run = (tmp_path / "run" / "probe" / "result.json").read_text()
    train_recipe(recipe(base), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "probe" / "result.json").read_text() == probe_run
    for name in ("setting.json", "adapter/adapter_model.safetensors", "history.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"n_keep": 99}, "n_keep=99, but a layer has only 7 targeted linears"),
        ({"budget": 10}, "a budget of 10 parameters is less than rank 1"),
    ],
)
def test_what_no_probe_could_serve_is_refused_before_one_is_trained(
    method: dict[str, int], message: str, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=message):
        train_recipe(recipe(base, method=method), out, progress=False)
    assert not list(out.iterdir())
    train_recipe(recipe(base), out, progress=False)


def test_a_recipe_put_right_after_its_probe_goes_on_with_it(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = recipe(base, method={"r": 2, "init_from_probe": True})
    with pytest.raises(ValueError, match="the probe has rank 4, this adapter 2"):
        train_recipe(wrong, out, progress=False)
    assert [path.name for path in out.iterdir()] == ["probe"]
    made = (out / "probe" / "result.json").read_text()
    with pytest.raises(
        CheckpointError, match=r"probe holds a run of another recipe .*method\.r: 4 there"
    ):
        train_recipe(recipe(base, method={"probe_r": 2}), out, progress=False)
    plain = recipe(base, method={"scorer": "random"})
    with pytest.raises(CheckpointError, match="already holds probe of something else"):
        train_recipe(plain, out, progress=False)
    train_recipe(recipe(base, method={"r": 4, "init_from_probe": True}), out, progress=False)
    assert (out / "probe" / "result.json").read_text() == made


def test_a_run_that_was_moved_goes_on_there(base: Path, tmp_path: Path) -> None:
    train_recipe(recipe(base), tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe(base), tmp_path / "run", progress=False, callbacks=[StopAt(3)])
    (tmp_path / "run").rename(tmp_path / "moved")
    train_recipe(recipe(base), tmp_path / "moved", resume=True, progress=False)
    for name in ("setting.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_does_not_go_on_with_another_setting(base: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe(base), tmp_path / "run", progress=False, callbacks=[StopAt(3)])
    handmade(tmp_path / "run" / "setting.json", [LLAMA[:2]] * 2)
    with pytest.raises(CheckpointError, match="setting: "):
        train_recipe(recipe(base), tmp_path / "run", resume=True, progress=False)


def test_a_probe_of_its_own_length_and_downstream_from_its_weights(
    base: Path, tmp_path: Path
) -> None:
    method = {"r": 4, "lora_alpha": 8, "probe_steps": 3, "init_from_probe": True}
    out = tmp_path / "run"
    train_recipe(recipe(base, method=method), out, progress=False)
    assert json.loads((out / "probe" / "result.json").read_text())["steps"] == 3
    config = FanLoRAConfig(
        r=4, lora_alpha=8, setting=str(out / "setting.json"), init_from_probe=True
    )
    handle = loramux.attach(build_pico("llama"), config)
    probe_handle = loramux.load(build_pico("llama"), out / "probe" / "adapter")
    for path, rows in adapter_of(handle).rows.items():
        theirs = adapter_of(probe_handle).rows[path]
        assert torch.equal(rows.a, theirs.a) and bool(rows.b.any())
        torch.testing.assert_close(rows.b * rows.spans.scale[0], theirs.b)
    wrong = FanLoRAConfig(r=2, setting=str(out / "setting.json"), init_from_probe=True)
    with pytest.raises(ValueError, match="the probe has rank 4, this adapter 2"):
        loramux.attach(build_pico("llama"), wrong)


def test_a_setting_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "setting.json").write_text("{}")
    text = "base: some/model\nmethod: {name: fanlora, setting: setting.json}\n"
    text += "data: {train: [{path: who/hub}]}\ntraining: {steps: 1}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (job,) = load_recipe(tmp_path / "recipe.yaml").jobs_resolved()
    assert job.method.fields["setting"] == str(tmp_path / "setting.json")


def test_a_setting_without_a_probe_cannot_start_from_it(tmp_path: Path) -> None:
    path = handmade(tmp_path / "setting.json", [LLAMA[:2]] * 2)
    with pytest.raises(ValueError, match="names no probe"):
        placed(path, init_from_probe=True)
    assert Setting.from_json(json.loads(path.read_text()), "x").probe is None
