"""A job that arrives while others train and is made of a probe: the probe is a job of the run, and the job follows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from joint.recipes import recipe, write_base
from loramux.recipe import parse_recipe
from loramux.train import Listener, StepEvent, Trainer, train_recipe

FAN = {
    "method": {
        "name": "fanlora", "r": 2, "n_keep": 2, "probe_r": 2, "probe_steps": 3, "scorer": "taylor", "score_rows": 6,
    },
    "training": {"steps": 3},
    "seed": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("probes"))


class StopAfter(Listener):
    def __init__(self, number: int):
        self.number = number

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if trainer.round == self.number:
            trainer.stop()


def run(base: Path, out: Path, *listeners: Listener, **changes: Any) -> Any:
    """A run of one job of five steps, with a FanLoRA waiting in its queue from the start."""
    if not out.exists():
        (out / "queue").mkdir(parents=True)
        (out / "queue" / "fan.yaml").write_text(yaml.safe_dump({**FAN, **changes}))
    jobs = [{"name": "one", "seed": 1}]
    return train_recipe(
        recipe(base, jobs=jobs), out, resume=True, progress=False, board=False, callbacks=listeners
    )


@pytest.fixture(scope="module")
def unbroken(base: Path) -> Path:
    result = run(base, base.parent / "unbroken")
    assert [(job["name"], job["status"], job["steps"]) for job in result["jobs"]] == [
        ("one", "finished", 5),
        ("fan-probe", "finished", 3),
        ("fan", "finished", 3),
    ]
    return base.parent / "unbroken"


def test_the_probe_is_trained_scored_and_followed_by_the_job(unbroken: Path) -> None:
    lines = [json.loads(line) for line in (unbroken / "journal.jsonl").read_text().splitlines()]
    assert [(line["round"], line["job"]) for line in lines] == [(1, "fan-probe"), (4, "fan")]
    setting = unbroken / "fan-probe" / "setting.json"
    assert lines[1]["value"]["method"]["setting"] == str(setting.resolve())
    assert json.loads(setting.read_text())["probe"] == "adapter"
    assert (unbroken / "queue" / "taken" / "fan.yaml").is_file()
    assert (unbroken / "fan" / "adapter").is_dir()


def test_the_setting_is_that_of_a_run_of_its_own(
    base: Path, unbroken: Path, tmp_path: Path
) -> None:
    shared = recipe(base).model_dump(mode="json")
    alone = {key: shared[key] for key in ("base", "dtype", "data")}
    training = {**shared["training"], **FAN["training"]}  # type: ignore[dict-item]
    alone |= {"method": FAN["method"], "seed": FAN["seed"], "training": training}
    train_recipe(parse_recipe(alone), tmp_path / "alone", progress=False, board=False)
    want = json.loads((tmp_path / "alone" / "setting.json").read_text())
    have = json.loads((unbroken / "fan-probe" / "setting.json").read_text())
    for ours, theirs in zip(have["layers"], want["layers"], strict=True):
        assert {name: entry["keep"] for name, entry in ours.items()} == {
            name: entry["keep"] for name, entry in theirs.items()
        }
        for name, entry in ours.items():
            assert entry["score"] == pytest.approx(theirs[name]["score"], rel=1e-2, abs=1e-5)


@pytest.mark.parametrize("number", [2, 3])
def test_a_run_that_stopped_before_the_job_came_ends_with_the_same_bits(
    base: Path, unbroken: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "run"
    run(base, out, StopAfter(number))
    assert not (out / "fan").exists()
    run(base, out)
    for job in ("one", "fan-probe", "fan"):
        (file,) = (out / job / "adapter").glob("*.safetensors")
        assert file.read_bytes() == (unbroken / job / "adapter" / file.name).read_bytes()


def test_a_probe_that_fails_leaves_its_reason_and_the_others_go_on(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(base, out, training={"steps": 3, "learning_rate": 1e200, "max_grad_norm": 1e9})
    assert [(job["name"], job["status"]) for job in result["jobs"]] == [
        ("one", "finished"),
        ("fan-probe", "failed"),
    ]
    reason = (out / "queue" / "refused" / "fan.txt").read_text()
    assert reason.startswith("its probe fan-probe has failed: the ")
    assert "Try a lower learning_rate" in reason


def test_a_job_that_no_probe_could_serve_is_refused_before_one_is_trained(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = run(base, out, method={**FAN["method"], "n_keep": 50})  # type: ignore[dict-item]
    assert [job["name"] for job in result["jobs"]] == ["one"]
    assert "n_keep=50" in (out / "queue" / "refused" / "fan.txt").read_text()
