"""A run writes every row once, whatever interrupts it, and goes on where it stood; failures are rows too."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compare.small import make_task, raw_suite, suite
from loramux.compare import SuiteError, parse_suite
from loramux.compare.plan import Item, make_plan
from loramux.compare.rows import ROWS, RowStore, locked
from loramux.compare.run import run_suite
from loramux.errors import LoramuxError

KILLED = """
import os, signal, sys
from pathlib import Path
from compare.small import suite
from compare.test_run import Fake
from loramux.compare.run import run_suite

class Kill(Fake):
    def __call__(self, item, *rest):
        if len(self.calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(item, *rest)

folder = Path(sys.argv[1])
run_suite(suite(folder, seeds=[0, 1]), folder / "out", progress=False, carry_out=Kill())
"""


class Fake:
    """Gives made-up results at once and notes what it was asked for."""

    def __init__(self, fail: str = "", slow: str = ""):
        self.calls: list[str] = []
        self.fail, self.slow = fail, slow

    def __call__(
        self, item: Item, folder: Path, needs: Mapping[str, Path], limit: float | None
    ) -> dict[str, Any]:
        self.calls.append(item.title)
        if self.fail and self.fail in item.title:
            raise ValueError("too hot")
        if self.slow and self.slow in item.title:
            time.sleep(0.3)
        right = "1" * 6 + "0" * 2 if item.label == "milora" else "1" * 4 + "0" * 4
        scores = {task: {"value": 0.5, "stderr": 0.1, "rows": right} for task in item.work["tests"]}
        return {"scores": scores, "tokens": item.tokens, "train_seconds": 2.0, "trainable": 10}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time and are looked at elsewhere."""
    monkeypatch.setattr("loramux.compare.plot.save_plots", lambda result, stem: [])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / ROWS).read_text().splitlines()]


def run(folder: Path, fake: Fake, **options: Any) -> dict[str, Any]:
    changes = options.pop("changes", {})
    return run_suite(
        suite(folder, **changes), folder / "out", progress=False, carry_out=fake, **options
    )


def test_a_killed_run_goes_on_and_writes_each_row_once(tmp_path: Path) -> None:
    raw_suite(tmp_path)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == -signal.SIGKILL
    assert len(lines(tmp_path / "out")) == 2
    with open(tmp_path / "out" / ROWS, "a") as file:
        file.write('{"id": "half a li')  # what a kill in the middle of a write leaves
    fake = Fake()
    run(tmp_path, fake, changes={"seeds": [0, 1]})
    assert len(fake.calls) == 2
    rows = lines(tmp_path / "out")
    assert len(rows) == len({row["id"] for row in rows}) == 4
    again = Fake()
    run(tmp_path, again, changes={"seeds": [0, 1]})
    assert again.calls == []


def test_a_failure_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    result = run(tmp_path, Fake(fail="lora mixed"))
    assert result["rows"] == {"planned": 2, "done": 2, "failed": 2}
    assert result["failed"][0] == {"row": "multi lora mixed seed 0", "reason": "too hot"}
    fake = Fake()
    run(tmp_path, fake)
    assert fake.calls == []
    assert run(tmp_path, fake, retry_failed=True)["rows"]["failed"] == 0
    assert len(fake.calls) == 2


def test_what_needs_a_failed_row_fails_with_that_reason(tmp_path: Path) -> None:
    fusion = {"adapters": "lora", "methods": ["base", "linear"]}
    changes = {"single": {"steps": 1, "methods": ["lora"]}, "multi": None, "fusion": fusion}
    fake = Fake(fail="single lora two")
    result = run(tmp_path, fake, changes=changes)
    assert "fusion base all seed 0" in fake.calls
    assert "fusion linear all seed 0" not in fake.calls
    reasons = {one["row"]: one["reason"] for one in result["failed"]}
    assert "whose training failed" in reasons["fusion linear all seed 0"]


def test_only_what_is_new_in_a_changed_suite_is_run(tmp_path: Path) -> None:
    run(tmp_path, Fake())
    methods = raw_suite(tmp_path)["methods"]
    methods["milora"]["method"]["top_k"] = 2
    methods["dora"] = {"method": {"name": "lora", "use_dora": True}}
    fake = Fake()
    run(tmp_path, fake, changes={"methods": methods})
    assert fake.calls == ["multi milora mixed seed 0", "multi dora mixed seed 0"]


def test_an_id_follows_the_content_of_the_data_and_not_its_place(tmp_path: Path) -> None:
    ids = [item.id for item in make_plan(suite(tmp_path / "here")).items]
    assert [item.id for item in make_plan(suite(tmp_path / "there")).items] == ids
    (tmp_path / "here" / "two" / "test.jsonl").write_text(
        (make_task(tmp_path / "new", 3) / "test.jsonl").read_text()
    )
    changed = [item.id for item in make_plan(suite(tmp_path / "here")).items]
    assert all(a != b for a, b in zip(changed, ids, strict=True))


def test_several_items_are_under_way_at_a_time_and_each_is_done_once(tmp_path: Path) -> None:
    changes = {
        "single": {"steps": 1},
        "fusion": {"adapters": "lora", "methods": ["linear", "cat"]},
        "seeds": [0, 1],
    }
    fake = Fake(slow="single lora two")
    result = run(tmp_path, fake, workers=3, changes=changes)
    assert result["rows"]["failed"] == 0
    assert len(fake.calls) == len(set(fake.calls)) == result["rows"]["planned"]
    first = fake.calls.index("fusion linear all seed 1")
    assert {"single lora one seed 1", "single lora two seed 1"} <= set(fake.calls[:first])


def test_a_second_run_into_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(SuiteError, match="another run is writing"):
        run(tmp_path, Fake())


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    (tmp_path / ROWS).write_text('{"id": "a"}\nnonsense\n')
    with pytest.raises(SuiteError, match=r"rows.jsonl:2 is not a row"):
        RowStore(tmp_path).read()


def test_nothing_is_run_where_the_budget_cannot_be_met(tmp_path: Path) -> None:
    methods = raw_suite(tmp_path)["methods"]
    methods["wide"] = {"method": {"name": "lora", "r": 4}, "match": None}
    fake = Fake()
    with pytest.raises(SuiteError, match="wide"):
        run(tmp_path, fake, changes={"methods": methods})
    assert fake.calls == []
    assert not (tmp_path / "out" / ROWS).exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = suite(tmp_path)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr("loramux.compare.run.make_plan", lambda _: pytest.fail("began"))
    for out in ("file", "file/out"):
        with pytest.raises(LoramuxError, match="cannot be made: Not a directory"):
            run_suite(given, tmp_path / out, progress=False, carry_out=Fake())


def test_a_suite_says_its_seeds_by_method(tmp_path: Path) -> None:
    raw = raw_suite(tmp_path)
    raw["methods"]["lora"]["seeds"] = [0, 1, 2]
    items = make_plan(parse_suite(raw)).items
    assert [(i.label, i.seed) for i in items] == [
        ("lora", 0),
        ("milora", 0),
        ("lora", 1),
        ("lora", 2),
    ]
