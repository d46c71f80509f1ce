"""`loramux batch`: answer a file of requests, many adapters in one batch."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json
from loramux.errors import DataError, LoramuxError


def batch(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="One request per line.")],
    base: Annotated[str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")],
    out: Annotated[
        Path, typer.Option(metavar="OUT.jsonl", help="Answers; lines answered there are skipped.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR", help="An adapter that lines may name; repeatable."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="New tokens at most, where a line has no own.")
    ] = 64,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Requests per step.")] = 64,
    kv_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Budget of keys and values.")
    ] = "512MiB",
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: that of the base.")] = None,
    json: JsonOption = None,
) -> None:
    """Answer every line of a file: {"prompt": TEXT or "messages": [...], "adapter": NAME or {NAME: WEIGHT},
    "max_tokens": 20, "temperature": 0.7, ...}.

    Bad lines are reported before anything runs. An interrupted run continues where it stopped.

    Example: loramux batch questions.jsonl --base smollm2-135m --adapter law=runs/law/adapter
    --adapter tone=runs/tone/adapter --out answers.jsonl
    """
    with only_json(json):
        result = _run(
            file, base, out, adapter or [], max_tokens, max_batch, kv_memory, threads, dtype
        )
    emit(result, json, _show)
    if result["failed"]:
        raise LoramuxError(
            f"{result['failed']} of {result['lines']} lines have no full answer; see 'error' in {out}"
        )


def _run(
    file: Path,
    base: str,
    out: Path,
    adapters: Iterable[str],
    max_tokens: int,
    max_batch: int,
    kv_memory: str,
    threads: int | None,
    dtype: str | None,
) -> dict[str, Any]:
    from loramux.engine.offline import read_done, read_jobs, run_jobs
    from loramux.engine.sources import identity_of

    folders = _folders(adapters)
    stamps = {name: f"{Path(f).resolve()} {identity_of(Path(f))}" for name, f in folders.items()}
    jobs = read_jobs(file, stamps, {"max_tokens": max_tokens}, f"{base} {dtype}")
    if out.exists() and out.samefile(file):
        raise DataError(f"--out {out} is the file of requests; give another file")
    records = list(read_done(out, jobs).values())
    done = {record["line"] for record in records}
    open_jobs = [job for job in jobs if job.line not in done]
    start = time.perf_counter()
    if open_jobs:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _engine(base, max_batch, kv_memory, threads, dtype) as engine:
            for name, folder in folders.items():
                engine.add_adapter(name, folder)
            start = time.perf_counter()  # of answering, without reading the base
            with _Bar(len(jobs), len(done)) as bar:

                def note(record: dict[str, Any]) -> None:
                    records.append(record)
                    bar.add(record)

                run_jobs(engine, open_jobs, out, note)
    seconds = time.perf_counter() - start
    tokens = sum(len(a["token_ids"]) for r in records[len(done) :] for a in r.get("answers", []))
    return {
        "out": str(out),
        "lines": len(jobs),
        "skipped": len(done),
        "failed": sum("error" in record for record in records),
        "tokens": tokens,
        "seconds": round(seconds, 3),
    }


def _engine(
    base: str, max_batch: int, kv_memory: str, threads: int | None, dtype: str | None
) -> Any:
    from loramux.engine.engine import Engine

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Engine(base, dtype=dtype, max_batch=max_batch, kv_memory=kv_memory)


def _folders(adapters: Iterable[str]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for value in adapters:
        name, equals, folder = value.partition("=")
        if not (name and equals and folder):
            raise LoramuxError(f"--adapter {value!r}: give NAME=DIR, such as law=runs/law/adapter")
        if name in folders:
            raise LoramuxError(f"--adapter {value}: {name!r} is {folders[name]!r} already")
        if not Path(folder).is_dir():
            raise LoramuxError(f"--adapter {value}: no adapter folder at {folder!r}")
        folders[name] = folder
    return folders


class _Bar:
    """Lines done and tokens per second, on standard error; nothing where that is no terminal."""

    def __init__(self, num_lines: int, num_done: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("lines  {task.fields[rate]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=num_lines, completed=num_done, rate="")
        self._start, self._tokens = time.perf_counter(), 0

    def add(self, record: dict[str, Any]) -> None:
        self._tokens += sum(len(answer["token_ids"]) for answer in record.get("answers", []))
        rate = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        self._progress.update(self._task, advance=1, rate=f"{rate:.0f} tokens/s")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _show(result: dict[str, Any]) -> None:
    asked = result["lines"] - result["skipped"]
    print(
        f"{asked} lines answered, {result['skipped']} were there, {result['failed']} failed; "
        f"{result['tokens']} tokens in {result['seconds']:.1f} s: {result['out']}"
    )
