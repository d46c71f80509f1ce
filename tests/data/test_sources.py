"""Rows come from JSONL, Parquet, folders, the shipped data or a hub, with their place and in order."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.data import read_task
from loramux.data.sources import read_rows
from loramux.errors import DataError, MissingExtraError
from loramux.recipe import DataSource

ROWS = [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(5)]


def prompts(**source: Any) -> list[str]:
    return [row["prompt"] for row, _, _ in read_rows(DataSource(**source))]


def test_skip_and_rows_choose_a_window(write_jsonl: Any) -> None:
    path = write_jsonl(*ROWS)
    assert prompts(path=path, skip=1, rows=2) == ["p1", "p2"]
    assert prompts(path=path, rows=9) == ["p0", "p1", "p2", "p3", "p4"]


def test_blank_lines_and_a_byte_order_mark_are_layout(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \n{"prompt": "b"}\n')
    found = list(read_rows(DataSource(path=str(path))))
    assert [where.rsplit(":", 1)[1] for _, where, _ in found] == ["1", "4"]


def test_the_task_is_the_sources_then_the_rows_then_the_folders(write_jsonl: Any) -> None:
    path = write_jsonl({"prompt": "a", "task": "own"}, {"prompt": "b"}, name="folder/train.jsonl")
    assert [task for _, _, task in read_rows(DataSource(path=path))] == ["own", "folder"]
    assert [t for _, _, t in read_rows(DataSource(path=path, task="set"))] == ["set", "set"]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    found = list(read_rows(DataSource(path=str(path), skip=3)))
    assert [row for row, _, _ in found] == ROWS[3:]
    assert found[0][1].endswith("x.parquet: row 4")


def test_a_file_that_only_looks_like_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("no")
    with pytest.raises(DataError, match=r"x.parquet: not a Parquet file"):
        prompts(path=str(path))


def test_a_folder_needs_a_split(write_jsonl: Any, tmp_path: Path) -> None:
    write_jsonl(*ROWS, name="f/train.jsonl")
    assert len(prompts(path=str(tmp_path / "f"), split="train")) == 5
    with pytest.raises(DataError, match="add `split: train`"):
        prompts(path=str(tmp_path / "f"))
    with pytest.raises(DataError, match=r"has no file test.jsonl"):
        prompts(path=str(tmp_path / "f"), split="test")


def test_any_other_name_is_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        if name != "who/what":
            raise FileNotFoundError("cannot be reached\nlong story")
        return [{"prompt": split}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert prompts(path="who/what") == ["train"]
    assert prompts(path="who/what", split="test") == ["test"]
    with pytest.raises(DataError, match="who/else: neither a local file nor.*cannot be reached$"):
        prompts(path="who/else")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loramux\[data\]'"):
        prompts(path="who/what")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r":2: not valid JSON"),
        (b"[1, 2]\n", r":1: each line must hold one JSON object, got list"),
        (b'{"prompt": "\xff"}\n', r":1: not UTF-8"),
        (b"", r"no rows; give a file with at least one row"),
        (b"\n\n", r"no rows"),
    ],
)
def test_a_broken_file_is_one_error_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prompts(path=str(path))


def test_skipping_everything_is_an_error(write_jsonl: Any) -> None:
    with pytest.raises(DataError, match="no rows after skipping 5"):
        prompts(path=write_jsonl(*ROWS), skip=5)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./nowhere", "/no/such/thing", "demo:x/y.jsonl"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_a_hub(path: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        prompts(path=path)


@pytest.mark.parametrize("path", ["demo:../demo.yaml", "demo:../../errors.py", "demo:/etc/hosts"])
def test_a_shipped_path_stays_in_the_shipped_data(path: str) -> None:
    with pytest.raises(DataError, match="leaves the data shipped with the package"):
        prompts(path=path)


def test_an_unknown_kind_of_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"unknown kind of file '.csv'"):
        prompts(path=str(path))


def test_task_rows_keep_choices_and_references(write_jsonl: Any) -> None:
    path = write_jsonl(
        {"task": "a", "prompt": "p", "choices": ["x", "y"], "answer": "y", "rationale": "-"},
        {"task": "b", "id": "7", "prompt": "p", "answer": "z", "references": ["z", "zz"]},
    )
    first, second = read_task(path)
    assert (first.task, first.choices, first.answer) == ("a", ("x", "y"), "y")
    assert (second.id, second.choices, second.references) == ("7", None, ("z", "zz"))
    assert read_task(path, rows=1) == [first]


SHIPPED = ["clickbait", "snips", "clinc", "banking", "e2e"] + [
    f"bbh_{name}" for name in ("hyperbaton", "disambiguation_qa", "object_counting")
]


@pytest.mark.parametrize("task", SHIPPED)
def test_every_shipped_task_is_whole_and_no_test_row_is_trained_on(task: str) -> None:
    splits = {s: read_task(f"demo:{task}/{s}.jsonl") for s in ("train", "validation", "test")}
    assert all(row.task == task for rows in splits.values() for row in rows)
    ids = [row.id for rows in splits.values() for row in rows]
    assert len(set(ids)) == len(ids)
    trained = {(row.prompt, row.choices) for row in splits["train"] + splits["validation"]}
    assert not [row.id for row in splits["test"] if (row.prompt, row.choices) in trained]


def test_every_shipped_task_has_its_notice_and_all_of_it_is_small() -> None:
    from importlib.resources import files

    folder = Path(str(files("loramux.demo"))) / "data"
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(SHIPPED)
    assert all(f"`{task}`" in notice for task in SHIPPED)
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 3_000_000
