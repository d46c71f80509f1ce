"""Pages of merged adapters and of comparisons: their numbers are those of the JSON beside them."""

import json
from pathlib import Path
from typing import Any

import pytest

import loramux
from loramux.compose.run import compose_adapters
from loramux.errors import LoramuxError
from loramux.report.build import make_report
from loramux.report.records import read_folder
from pico import build_pico
from report.folders import records
from report.test_run_report import EVIL, Page


def entry(method: str, mean: float, says: str = "") -> dict[str, Any]:
    found = None
    if says:
        found = {"value": mean - 0.8, "low": mean - 0.82, "high": mean - 0.78, "says": says}
    return {
        "method": method,
        "seeds": [0, 1],
        "mean": mean,
        "by_seed": [mean - 0.01, mean + 0.01],
        "spread": 0.014,
        "row_error": 0.02,
        "tasks": {"snips": {"mean": mean, "spread": 0.01}},
        "difference": found,
        "train_seconds": 12.5,
        "peak_mb": 101.0,
        "active": 1000.0,
        "parameters": 1200.0,
        "trainable_at_end": 1000.0,
        "decode": {"value": 1.25, "low": 1.2, "high": 1.3},
        "servability": "static",
    }


def comparison(folder: Path) -> dict[str, Any]:
    """A folder of `loramux compare`; returns its results."""
    folder.mkdir()
    methods = [entry("lora", 0.8), entry("smora", 0.85, "above"), entry(EVIL, 0.7, "below")]
    result = {
        "suite": EVIL,
        "base": "some/base",
        "metric": "token",
        "reference": "lora",
        "budget": 1000,
        "rows": {"planned": 8, "done": 6, "failed": 1},
        "matched": {"lora": {"parameters": 1000, "deviation": 0.01, "how": "r=8", "note": ""}},
        "absent": {"xlora": "is not installed"},
        "failed": [{"row": "multi mola all seed 1", "reason": "ran out of memory"}],
        "parts": {
            "multi": {"reference": "lora", "tasks": ["snips"], "tokens": {}, "methods": methods}
        },
    }
    (folder / "results.json").write_text(json.dumps(result))
    row = {"id": "a", "part": "multi", "method": "lora", "task": "all", "seed": 0, "status": "ok"}
    (folder / "rows.jsonl").write_text(json.dumps({**row, "scores": {"snips": [1, 0]}}) + "\n")
    return result


@pytest.mark.filterwarnings("error")
def test_a_comparison_becomes_tables_and_a_picture(tmp_path: Path) -> None:
    result = comparison(tmp_path / "out")
    made = make_report(tmp_path / "out")
    found = records(Path(made["report"]))
    assert found["kind"] == "comparison"
    title = "All tasks mixed, one adapter"
    assert found[f"comparison: {title}"] == result["parts"]["multi"]
    page = Page(Path(made["report"]))
    assert {"0.85", "above", "1.25", "101"} <= set(page.texts)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert len(page.images) == 1
    missing = {part["what"]: part["how"] for part in made["missing"]}
    assert missing["xlora"] == "is not installed"
    assert "ran out of memory" in missing["Row multi mola all seed 1"]


def test_a_comparison_that_has_only_rows_yet_shows_them(tmp_path: Path) -> None:
    comparison(tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    made = make_report(tmp_path / "out")
    (row,) = records(Path(made["report"]))["rows"]
    assert row == {"part": "multi", "method": "lora", "task": "all", "seed": 0, "status": "ok"}
    assert "loramux compare" in made["missing"][0]["how"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"sentence": "hi"}, "sentence"), ({"data": ["x.jsonl"], "base": "b"}, "base, data")],
)
def test_a_comparison_is_asked_for_no_sentence_and_no_rows(
    asked: dict[str, Any], named: str, tmp_path: Path
) -> None:
    comparison(tmp_path / "out")
    with pytest.raises(LoramuxError, match=f"is a comparison, whose page takes no {named};"):
        make_report(tmp_path / "out", **asked)


def test_a_page_that_cannot_be_written_is_refused_before_it_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison(tmp_path / "out")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("loramux.report.build.build_report", lambda *_: pytest.fail("began"))
    with pytest.raises(LoramuxError, match=r"x\.html cannot be made: Not a directory"):
        make_report(tmp_path / "out", tmp_path / "file" / "x.html")


def test_only_the_merge_itself_says_where_an_adapter_came_from(tmp_path: Path) -> None:
    folder = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=2)).save(tmp_path / "a")
    for name in ("provenance.json", "composed.json"):
        (folder / name).write_text('{"method": "ties"}')
    assert read_folder(folder).kind == "adapter"
    (folder / "compose.json").write_text('{"method": "ties"}')
    assert read_folder(folder).kind == "merged adapter"


@pytest.mark.parametrize("method", ["ties", "cat"])
def test_a_merge_shows_what_went_in_and_how_alike_it_was(method: str, tmp_path: Path) -> None:
    import torch

    folders = []
    for seed, rank in enumerate((2, 3)):
        torch.manual_seed(seed)
        handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=rank))
        with torch.no_grad():
            for parameter in handle.trainable_parameters().values():
                parameter.normal_()
        folders.append(handle.save(tmp_path / f"adapter{seed}"))
    facts = compose_adapters(method, folders, tmp_path / "out", weights=[0.5, 0.25])
    made = make_report(tmp_path / "out")
    assert made["kind"] == "merged adapter"
    found = records(Path(made["report"]))["merge"]
    assert found["similarity"] == facts["similarity"]
    assert found["sites"] == json.loads((tmp_path / "out" / "compose.json").read_text())["sites"]
    texts = Page(Path(made["report"])).texts
    assert {"adapter0", "adapter1", "0.5", "0.25"} <= set(texts)
    low = facts["similarity"]["overall"][0][1]
    assert any(f"{low:.3f}" in image["alt"] for image in Page(Path(made["report"])).images)
