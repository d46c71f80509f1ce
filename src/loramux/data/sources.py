"""Rows from where they lie: JSONL, Parquet, a folder of splits, the data shipped with the package, or a hub dataset.

Why every row carries its place: whatever is wrong with a row later is reported with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from loramux.errors import DataError, require
from loramux.recipe import DEMO_PREFIX, DataSource

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
PlacedRow = tuple[dict[str, Any], str, str]


def read_rows(source: DataSource) -> Iterator[PlacedRow]:
    """(row, "file:line", task name) after `skip` rows, at most `rows` of them; none at all is an error.

    The task name is the source's own, else the row's, else taken from the file name.
    """
    path = locate(source)
    name = default_task(path) if isinstance(path, Path) else str(path)
    found = _placed(path, source)
    stop = None if source.rows is None else source.skip + source.rows
    count = 0
    for row, where in islice(found, source.skip, stop):
        count += 1
        yield row, where, source.task or str(row.get("task") or name)
    if count == 0:
        after = f" after skipping {source.skip}" if source.skip else ""
        raise DataError(f"{source.path}: no rows{after}; give a file with at least one row")


def locate(source: DataSource) -> Path | str:
    """The file to read, or the name of a hub dataset.

    `demo:TASK/SPLIT.jsonl` names a file shipped with the package; a folder needs a `split`.
    """
    text = source.path
    if text.startswith(DEMO_PREFIX):
        shipped = Path(str(files("loramux.demo"))) / "data"
        path = shipped / text.removeprefix(DEMO_PREFIX)
        if not path.resolve().is_relative_to(shipped.resolve()):
            raise DataError(
                f"{text}: leaves the data shipped with the package; write {DEMO_PREFIX}TASK/SPLIT.jsonl, "
                "or give the path of a file without the prefix"
            )
        return _in_folder(path, source)
    path = Path(text).expanduser()
    if path.exists():
        return _in_folder(path, source)
    if path.suffix in JSON_SUFFIXES + PARQUET_SUFFIXES or text.count("/") > 1 or text[0] in "./~":
        raise DataError(f"{text}: no such file")
    return text


def default_task(path: Path) -> str:
    """`snips/train.jsonl` is the task snips; any other file is named by itself."""
    splits = ("train", "validation", "valid", "dev", "test")
    return path.parent.name if path.stem in splits and path.parent.name else path.stem


def _in_folder(path: Path, source: DataSource) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{source.path}: no such file")
        return path
    if source.split is None:
        raise DataError(f"{source.path}: is a folder; name a file in it or add `split: train`")
    for suffix in JSON_SUFFIXES + PARQUET_SUFFIXES:
        candidate = path / f"{source.split}{suffix}"
        if candidate.exists():
            return candidate
    raise DataError(f"{source.path}: has no file {source.split}.jsonl or {source.split}.parquet")


def _placed(path: Path | str, source: DataSource) -> Iterator[tuple[dict[str, Any], str]]:
    if isinstance(path, str):
        return _hub(path, source.split or "train")
    if path.suffix in JSON_SUFFIXES:
        return _jsonl(path)
    if path.suffix in PARQUET_SUFFIXES:
        return _parquet(path)
    raise DataError(
        f"{path}: unknown kind of file {path.suffix!r}; "
        f"allowed: {', '.join(JSON_SUFFIXES + PARQUET_SUFFIXES)}"
    )


def _jsonl(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason}); convert the file") from None
            if line:
                yield _parse(line, where), where


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); "
            "each line must hold one JSON object"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must hold one JSON object, got {type(row).__name__}")
    return row


def _parquet(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    parquet = require("pyarrow.parquet", "data", f"reading {path.name}")
    pyarrow = require("pyarrow", "data", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}: row {number}"
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None


def _hub(name: str, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    datasets = require("datasets", "data", f"the hub dataset {name!r}")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # many unrelated types, from the network down to the loader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{name}: neither a local file nor a hub dataset that can be read (split {split!r}): {reason}"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield dict(row), f"{name}[{split}]: row {number}"
