"""What is written at the end: tables, pictures and JSON that say the same, and what is not there."""

import json
from pathlib import Path
from typing import Any

import pytest

from compare.small import raw_suite, suite
from compare.test_run import Fake
from loramux.cli.main import main
from loramux.compare.dry import dry_run
from loramux.compare.plan import make_plan
from loramux.compare.progress import Clock, cost, duration
from loramux.compare.rows import locked
from loramux.compare.run import results, run_suite
from loramux.compare.tables import markdown


def made(folder: Path, **changes: Any) -> dict[str, Any]:
    changes = {"single": {"steps": 1}, "seeds": [0, 1]} | changes
    checked = suite(folder, **changes)
    return run_suite(checked, folder / "out", progress=False, carry_out=Fake())


def test_every_method_stands_against_the_reference(tmp_path: Path) -> None:
    result = made(tmp_path)
    lora, milora = result["parts"]["multi"]["methods"]
    assert (lora["mean"], milora["mean"]) == (0.5, 0.75)
    assert lora["difference"] is None
    assert milora["difference"]["value"] == 0.25
    assert milora["difference"]["seeds"] == 2
    assert milora["spread"] == 0.0
    assert milora["train_seconds"] == 2.0
    assert set(result["parts"]["multi"]["tasks"]) == {"one", "two"}
    assert list(result["parts"]["multi"]["tokens"]) == ["mixed"]
    assert list(result["parts"]["single"]["tokens"]) == ["one", "two"]


def test_files_are_written_and_agree(tmp_path: Path) -> None:
    result = made(tmp_path)
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    assert (out / "results.md").read_text() == markdown(result)
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (out / "results.svg").read_text()
    text = markdown(result)
    assert "| milora | 0.750 ± 0.000 (±" in text
    assert "+0.250 [" in text
    widths = [line.count(" | ") for line in text.splitlines() if line.startswith("| milora | 0.7")]
    assert len(set(widths)) == 1


def test_rows_of_another_suite_in_the_folder_are_left_out(tmp_path: Path) -> None:
    made(tmp_path)
    result = made(tmp_path, multi={"steps": 3}, single=None)
    assert result["rows"]["planned"] == result["rows"]["done"] == 4


def test_a_method_without_all_tasks_has_no_mean_yet(tmp_path: Path) -> None:
    result = run_suite(
        suite(tmp_path, single={"steps": 1}, multi=None),
        tmp_path / "out",
        only=["one"],
        progress=False,
        carry_out=Fake(),
    )
    entry = result["parts"]["single"]["methods"][0]
    assert entry["mean"] is None
    assert entry["tasks"]["one"]["mean"] == 0.5
    assert entry["tasks"]["two"]["mean"] is None
    assert "| lora | - | 0 | - | 0.500 | - |" in markdown(result)


def test_tables_on_demand_write_nothing(tmp_path: Path) -> None:
    checked = suite(tmp_path)
    with locked(tmp_path / "out"):  # a run is under way
        found = results(checked, tmp_path / "out")
    assert found["rows"] == {"planned": 2, "done": 0, "failed": 0}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(tmp_path: Path) -> None:
    plan = dry_run(suite(tmp_path), tmp_path / "out")
    assert [row["method"] for row in plan["rows"]] == ["lora", "milora"]
    assert plan["left"] == 2
    assert plan["seconds"] >= 30
    assert plan["matched"]["lora"]["deviation"] == 0.0
    assert not (tmp_path / "out").exists()


def test_the_time_left_follows_what_rows_of_the_same_method_took(tmp_path: Path) -> None:
    lora, milora = make_plan(suite(tmp_path)).items
    clock = Clock()
    assert clock.seconds([lora]) is None
    clock.learn(lora, {"status": "ok", "wall_seconds": 115.0})
    assert cost(lora) == cost(milora)
    assert clock.seconds([milora, lora]) == pytest.approx(230.0)
    clock.learn(milora, {"status": "ok", "wall_seconds": 215.0})
    assert clock.seconds([lora]) == pytest.approx(115.0)
    assert (duration(40), duration(720), duration(12_000)) == ("40 s", "12 min", "3 h 20 min")


def test_the_command_plans_prints_tables_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    made(tmp_path)
    raw = raw_suite(tmp_path, single={"steps": 1}, seeds=[0, 1])
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(raw))
    capsys.readouterr()
    assert main(["compare", str(path), "--out", str(tmp_path / "out"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# small\n")
    words = ["--only", "multi", "lora", "--json", "-"]
    assert main(["compare", str(path), "--dry-run", *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    assert main(["compare", str(path)]) == 2
    path.write_text(yaml.safe_dump(raw | {"metirc": "token"}))
    assert main(["compare", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "did you mean 'metric'" in error
