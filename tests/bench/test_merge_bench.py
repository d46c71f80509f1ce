"""The merge bench runs, puts torch's threads back, and says rank, error and seconds of every method."""

import json
from pathlib import Path

import pytest
import torch

from loramux.bench.merge import main, measure, random_pair
from loramux.compose.mergers import merger_names


def test_every_method_that_needs_no_base_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "merge.json"
    before = torch.get_num_threads()
    size = ["--width", "48", "--rank", "4", "--rounds", "1", "--threads", "1"]
    assert main([*size, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["method"] for row in rows] == [n for n in merger_names() if n != "lorahub"]
    assert all(row["seconds"] > 0 and row["rank"] in (4, 8) for row in rows)
    shown = capsys.readouterr().out
    assert "ties" in shown and "(target 4 s)" in shown
    assert torch.get_num_threads() == before


def test_a_method_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["lorahub"])
    assert "no merging method to time is called 'lorahub'" in capsys.readouterr().err


def test_cat_keeps_all_and_svd_of_a_pair_half():
    parts = random_pair(32, 3)
    assert measure("cat", parts, 1)["rank"] == 6
    row = measure("svd", parts, 1)
    assert row["rank"] == 3 and 0 < row["error"] < 1
    assert row["distance"] == pytest.approx(row["error"])
