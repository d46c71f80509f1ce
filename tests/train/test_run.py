"""From a recipe to a folder: everything that is promised lies in it, and it belongs to one run."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from loramux.errors import LoramuxError
from loramux.recipe import Recipe, parse_recipe
from loramux.train import CheckpointError, Listener, StepEvent, Trainer, TrainingError, train_recipe
from pico import build_pico, pico_tokenizer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    rows = [
        {"prompt": f"What letter comes after {a}?", "completion": b, "task": "letters"}
        for a, b in zip("abcdefghijklmno", "bcdefghijklmnop", strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    return folder


def recipe(base: Path, **changes: Any) -> Recipe:
    training = {"steps": 6, "learning_rate": 1e-2, "micro_batch_size": 4, "eval_every": 3}
    raw = {
        "base": str(base),
        "dtype": "float32",
        "method": {"name": "milora", "r": 4},
        "data": {
            "train": [{"path": str(base.parent / "rows.jsonl"), "rows": 10}],
            "validation": [{"path": str(base.parent / "rows.jsonl"), "skip": 10}],
        },
        "training": training | changes.pop("training", {}),
    }
    return parse_recipe(raw | changes)


def test_the_folder_holds_all_results_and_the_adapter_loads(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train_recipe(recipe(base), out, progress=False)
    assert {
        "out",
        "adapter",
        "steps",
        "train_loss",
        "val_loss",
        "seconds",
        "tokens_per_second",
        "jobs",
    } == set(result)
    assert result["steps"] == 6
    assert result["adapter"] == str(out / "adapter")
    history = json.loads((out / "history.json").read_text())
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert {"step", "loss", "aux", "lr", "tokens", "val_loss"} <= set(history[-1])
    assert result["val_loss"] == min(row["val_loss"] for row in history if "val_loss" in row)
    assert list((out / "tensorboard").glob("events.*"))
    assert (out / "best").is_dir()
    assert json.loads((out / "result.json").read_text()) == result
    model = build_pico("llama")
    model.name_or_path = str(base)
    handle = loramux.load(model, out / "adapter")
    assert handle.adapters["default"].method.name == "milora"


def test_several_jobs_get_a_folder_each(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    jobs = [
        {"name": "one", "seed": 1},
        {"name": "two", "method": {"name": "lora", "r": 2}, "training": {"steps": 3}},
    ]
    result = train_recipe(recipe(base, jobs=jobs), out, progress=False)
    assert result["adapter"] is None
    assert [job["steps"] for job in result["jobs"]] == [6, 3]
    for job in result["jobs"]:
        assert job["adapter"] == str(out / job["name"] / "adapter")
        assert (out / job["name"] / "history.json").is_file()
        assert list((out / "tensorboard" / job["name"]).glob("events.*"))


def test_a_job_starts_alike_whatever_its_place_in_the_list(base: Path, tmp_path: Path) -> None:
    names = [{"name": "one", "seed": 7}, {"name": "two", "seed": 8}]
    train_recipe(recipe(base, jobs=names), tmp_path / "forward", progress=False)
    train_recipe(recipe(base, jobs=names[::-1]), tmp_path / "backward", progress=False)
    for name in ("one", "two"):
        files = [tmp_path / run / name / "history.json" for run in ("forward", "backward")]
        assert files[0].read_text() == files[1].read_text()


class Interrupt(Listener):
    def __init__(self, step: int, number: int):
        self.step = step
        self.number = number

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_with_the_same_command(
    number: int, base: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    train_recipe(recipe(base), tmp_path / "unbroken", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(
            recipe(base), tmp_path / "run", progress=False, callbacks=[Interrupt(4, number)]
        )
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / "adapter").exists()
    result = train_recipe(recipe(base), tmp_path / "run", resume=True, progress=False)
    assert result["jobs"][0]["status"] == "finished"
    for name in ("history.json", "adapter/router.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_a_complete_run_is_returned_at_once(base: Path, tmp_path: Path) -> None:
    first = train_recipe(recipe(base), tmp_path / "run", progress=False)

    class Never(Listener):
        def started(self, trainer: Trainer) -> None:
            raise AssertionError("nothing is to be trained")

    again = train_recipe(
        recipe(base), tmp_path / "run", resume=True, progress=False, callbacks=[Never()]
    )
    assert again == first


def test_a_folder_of_another_run_is_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path
) -> None:
    train_recipe(recipe(base), tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match="resume it"):
        train_recipe(recipe(base), tmp_path / "run", progress=False)
    other = recipe(base, seed=3, training={"steps": 9})
    with pytest.raises(CheckpointError, match=r"seed: 0 there, 3 here.*steps: 6 there, 9 here"):
        train_recipe(other, tmp_path / "run", resume=True, progress=False)
    strange = tmp_path / "strange"
    (strange / "adapter").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="adapter of something else"):
        train_recipe(recipe(base), strange, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        train_recipe(recipe(base), tmp_path / "file", progress=False)


def test_a_base_that_cannot_be_read_is_one_error_and_claims_no_folder(
    base: Path, tmp_path: Path
) -> None:
    wrong = recipe(base).model_copy(update={"base": "some/model"})
    with pytest.raises(LoramuxError, match=r"the base 'some/model' cannot be read: .* hub id"):
        train_recipe(wrong, tmp_path / "run", progress=False)
    assert train_recipe(recipe(base), tmp_path / "run", progress=False)["steps"] == 6


def test_a_folder_with_other_files_is_fine(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("mine")
    train_recipe(recipe(base), tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "report.html").read_text() == "mine"


def test_threads_and_how_often_states_are_written_may_change_on_the_way(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_recipe(
            recipe(base), tmp_path / "run", progress=False, callbacks=[Interrupt(2, signal.SIGINT)]
        )
    changed = recipe(base, threads=1, training={"save_every": 2})
    assert train_recipe(changed, tmp_path / "run", resume=True, progress=False)["steps"] == 6


def test_changed_data_behind_the_same_recipe_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_recipe(
            recipe(base), tmp_path / "run", progress=False, callbacks=[Interrupt(2, signal.SIGINT)]
        )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("after a?", "after z?"))
    with pytest.raises(CheckpointError, match=r"data\.train"):
        train_recipe(recipe(base), tmp_path / "run", resume=True, progress=False)


def test_a_run_in_which_every_job_fails_is_an_error_with_the_reason(
    base: Path, tmp_path: Path
) -> None:
    training = {"learning_rate": 1e25, "max_grad_norm": 1e9}
    with pytest.raises(TrainingError, match=r"job default: the .* not finite") as error:
        train_recipe(
            recipe(base, method={"name": "lora"}, training=training),
            tmp_path / "run",
            progress=False,
        )
    assert isinstance(error.value, LoramuxError)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["jobs"][0]["status"] == "failed"


def test_a_half_precision_base_keeps_its_dtype(base: Path, tmp_path: Path) -> None:
    seen = []

    class Look(Listener):
        def started(self, trainer: Trainer) -> None:
            seen.append({p.dtype for p in trainer.model.lm_head.parameters()})

    train_recipe(
        recipe(base, dtype="bfloat16"), tmp_path / "run", progress=False, callbacks=[Look()]
    )
    assert seen == [{torch.bfloat16}]
