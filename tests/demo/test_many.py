"""The run of many adapters against their solo runs: its parts, what is kept of them, and its tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux.demo import many, many_part
from loramux.demo.many import JOINT, PEFT, SOLO, Part, Setting
from pico import build_pico, pico_tokenizer


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    folder = tmp_path / "base"
    build_pico("llama", max_position_embeddings=1024).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return Setting(
        str(folder), ("snips", "e2e"), (0, 3), steps=2, rows=2, test_rows=3, generated_rows=2, rank=2,
        sequence_len=1024,
    )  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts run in this process; gives the names of those that were run."""
    ran: list[str] = []

    def run(runs: Path, setting: Setting, part: Part) -> dict[str, Any]:
        ran.append(part.name)
        found = many_part.work(setting, part, runs / part.name)
        return dict(json.loads(json.dumps(found)))

    monkeypatch.setattr(many, "_in_a_process", run)
    return ran


def test_every_task_is_compared_with_its_solo_run_and_finished_parts_stay(
    setting: Setting, here: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "many"
    report = many.main(out, setting, lambda _: None)
    assert here == [part.name for part in many.parts(setting)]
    assert here[:4] == ["base", "joint-0", "solo-0-snips", "solo-0-e2e"]
    assert [row["task"] for row in report["tasks"]] == ["snips", "e2e"]
    for row in report["tasks"]:
        # Equal batches, seeds and steps: in fp32 on so small a base the losses agree to rounding.
        for together, alone in row["loss_by_seed"]:
            assert together == pytest.approx(alone, rel=1e-4)
        assert row["within_noise"]
    together, turns, peft = report["cost"]
    assert together["tokens"] == turns["tokens"] == peft["tokens"] > 0
    assert "| snips | token | 3 |" in (out / "many.md").read_text()

    here.clear()
    (out / "parts" / "solo-3-e2e.json").write_text("half")
    assert many.main(out, setting, lambda _: None)["tasks"] == report["tasks"]
    assert here == ["solo-3-e2e"]
    here.clear()
    other = many.Setting(**{**vars(setting), "steps": 1})
    many.main(out, other, lambda _: None)
    assert len(here) == len(list(many.parts(setting)))


def test_a_difference_beyond_two_standard_errors_is_called_one(setting: Setting) -> None:
    from loramux.demo.many_table import Results, page, summary

    def part(right: list[float], peak: float | None = 10.0) -> dict[str, Any]:
        value = sum(right) / len(right)
        score = {"value": value, "metric": "token", "rows": len(right), "row_scores": right}
        training = {
            "tokens": 5, "seconds": 2.0, "cpu_seconds": 1.0, "peak_mb": peak, "loss": {"snips": 1.0}
        }  # fmt: skip
        return {"scores": {"snips": score}, "training": training, "threads": 1}

    worse, better = part([0.0] * 9 + [1.0]), part([1.0] * 10)
    results = Results(("snips",), (0,), "", worse, {0: worse}, {0: [better]}, [better])
    row = summary(results)["tasks"][0]
    assert row["difference"] == pytest.approx(-0.9)
    assert not row["within_noise"]
    assert "outside two standard errors: snips" in page(results)
    same = summary(replace(results, joint={0: better}))["tasks"][0]
    assert (same["difference"], same["stderr"], same["within_noise"]) == (0, 0, True)
    unknown = part([1.0] * 10, peak=None)  # a system that cannot tell its peak
    assert "| - | - |" in page(replace(results, joint={0: unknown}, peft=[unknown]))


def test_peft_takes_the_batches_and_the_schedule_of_the_job(setting: Setting) -> None:
    from loramux.train.run import build_job, read_base, read_tokenizer

    part = Part(PEFT, 0, ("snips",))
    (recipe,) = many_part.recipe_of(setting, part).jobs_resolved()
    job = build_job(recipe, read_tokenizer(recipe))
    ours = many_part.work(setting, replace(part, kind=SOLO), Path(setting.base).parent / "run")
    peft = many_part.train_in_peft(read_base(recipe).to(torch.bfloat16), job, setting)
    assert peft["tokens"] == ours["training"]["tokens"]
    # B starts at zero, so first losses are the base's; nothing is learnt in two steps.
    assert peft["loss"]["snips"] == pytest.approx(ours["training"]["loss"]["snips"], rel=0.02)


def test_a_part_that_fails_says_what_it_said(setting: Setting, tmp_path: Path) -> None:
    broken = replace(setting, base=str(tmp_path / "nothing"))
    with pytest.raises(many.ManyError, match="joint-0 failed; the same command goes on with it"):
        many._in_a_process(tmp_path / "runs", broken, Part(JOINT, 0, ("snips",)))


def test_the_command_line_is_the_setting(tmp_path: Path) -> None:
    given = ["--out", str(tmp_path), "--tasks", "snips", "--seeds", "4", "--test-rows", "7"]
    out, setting = many.setting_of(given)
    assert (out, setting.tasks, setting.seeds, setting.test_rows) == (tmp_path, ("snips",), (4,), 7)
