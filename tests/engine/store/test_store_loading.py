"""Reading while others run: who is read first, who is not read at all, and folders that are broken."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.folders import (
    CONFIG,
    WEIGHTS,
    Folders,
    Gate,
    lease_of,
    truncate,
    wait_for,
    write_lora,
)
from loramux.engine.content import Content
from loramux.engine.loader import Job
from loramux.engine.store import AdapterStore
from pico import build_pico


def test_want_returns_at_once_and_others_run_while_an_adapter_loads(
    store: AdapterStore, lora: Folders
) -> None:
    store.register("here", lora(0))
    store.release(lease_of(store, "here"))
    gate = Gate(store)
    store.register("slow", lora(1))
    ticket = store.want((("slow", 1.0),))
    assert gate.begun.wait(20)
    assert ticket.state == "loading"
    assert store.lease(ticket) is None
    other = lease_of(store, "here")
    store.release(other)
    gate.go.set()
    assert wait_for(store, ticket) == "ready"


def test_the_oldest_request_is_read_first_and_the_cancelled_never(
    store: AdapterStore, lora: Folders
) -> None:
    gate = Gate(store)
    for i in range(5):
        store.register(f"a{i}", lora(i))
    store.prefetch(["a4"])  # starts at once
    tickets = [store.want(((f"a{i}", 1.0),)) for i in (2, 1, 0)]
    store.drop(tickets.pop(1))
    gate.go.set()
    assert [wait_for(store, ticket) for ticket in tickets] == ["ready", "ready"]
    assert gate.read == ["4", "2", "0"]


def test_a_forgotten_ticket_is_a_cancelled_one(store: AdapterStore, lora: Folders) -> None:
    gate = Gate(store)
    for i in range(3):
        store.register(f"a{i}", lora(i))
    first = store.want((("a0", 1.0),))
    store.want((("a1", 1.0),))
    last = store.want((("a2", 1.0),))
    gate.go.set()
    assert wait_for(store, first) == wait_for(store, last) == "ready"
    assert gate.read == ["0", "2"]


def test_one_read_serves_all_requests_for_a_name(store: AdapterStore, lora: Folders) -> None:
    store.register("a", lora(0))
    tickets = [store.want((("a", 1.0),)) for _ in range(5)]
    assert {wait_for(store, ticket) for ticket in tickets} == {"ready"}
    assert store.stats().num_loads == 1


def test_prefetched_adapters_are_ready_at_once(store: AdapterStore, lora: Folders) -> None:
    store.register("a", lora(0))
    store.prefetch(["a"])
    assert store.wait(20)
    assert store.want((("a", 1.0),)).state == "ready"
    assert store.stats().num_loads == 1


def break_json(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def lose_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def make_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "not an intact safetensors file"),
        (break_json, "not valid JSON"),
        (lose_weights, "missing"),
        (lose_folder, "not a folder"),
        (make_pipe, "not a regular file"),
    ],
)
def test_a_broken_folder_fails_its_own_request_and_can_be_repaired(
    harm: Callable[[Path], None],
    message: str,
    store: AdapterStore,
    lora: Folders,
    tmp_path: Path,
) -> None:
    broken = shutil.copytree(lora(1), tmp_path / "broken")
    harm(broken)
    store.register("good", lora(0))
    store.register("bad", broken)
    bad, good = store.want((("bad", 1.0),)), store.want((("good", 1.0),))
    assert wait_for(store, bad) == "failed"
    assert bad.error is not None and "adapter 'bad': " in bad.error and message in bad.error
    with pytest.raises(ValueError, match="adapter 'bad'"):
        store.lease(bad)
    assert wait_for(store, good) == "ready"
    store.check_integrity()
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(lora(1), broken)
    store.release(lease_of(store, "bad"))
    assert bad.state == "failed"


def test_an_error_nobody_foresaw_fails_the_request_too(store: AdapterStore, lora: Folders) -> None:
    def explode(folder: Path) -> Content:
        raise RuntimeError("out of luck")

    store._intake._loader._read = explode
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "failed"
    assert ticket.error == "adapter 'a': out of luck"


def test_a_panic_of_a_native_reader_fails_its_own_request_and_no_later_one(
    store: AdapterStore, lora: Folders
) -> None:
    """Regression: what is no Exception ended the loader's thread, and later requests waited for ever."""
    inner = store._intake._loader._read

    class Panic(BaseException):
        pass

    def panic(folder: Path) -> Content:
        raise Panic("called `unwrap` on nothing")

    store._intake._loader._read = panic
    store.register("a", lora(0))
    ticket = store.want((("a", 1.0),))
    assert wait_for(store, ticket) == "failed"
    assert "reading it failed: Panic" in str(ticket.error)
    store._intake._loader._read = inner
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"


def test_a_thread_that_cannot_be_started_fails_the_request_and_no_later_one(
    store: AdapterStore, lora: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store.register("a", lora(0))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ticket = store.want((("a", 1.0),))
        assert ticket.state == "failed"
    assert "no thread could be started to read it" in str(ticket.error)
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"


def test_an_error_of_an_older_version_of_a_folder_is_not_a_later_requests(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    truncate(folder)
    store.register("a", folder)
    early = store.want((("a", 1.0),))
    assert store.wait(20)  # the error is there, and nobody has looked at it
    write_lora(build_pico("llama"), folder)
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"
    assert early.state in ("ready", "failed")


def test_a_folder_repaired_before_anybody_was_told_what_is_wrong_with_it_is_read_again(
    store: AdapterStore, lora: Folders, tmp_path: Path
) -> None:
    folder = shutil.copytree(lora(0), tmp_path / "a")
    truncate(folder)
    store.register("a", folder)
    told, read = store._intake._loader._done, []

    def done(job: Job) -> None:
        read.append(job.error)
        if job.error is not None:
            write_lora(build_pico("llama"), folder)
        told(job)

    store._intake._loader._done = done
    assert wait_for(store, store.want((("a", 1.0),))) == "ready"
    assert [error is None for error in read] == [False, True]
