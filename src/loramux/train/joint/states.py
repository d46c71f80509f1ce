"""The states of a joint run: one folder for all jobs, so that they stand in the same round.

A job that has ended needs no tensors: its adapter is written, and how it ended is a row of the state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loramux.train.checkpoint import CheckpointError, CheckpointStore, Saved, refuse_other
from loramux.train.trainer import JobResult

if TYPE_CHECKING:
    from loramux.train.joint.entry import Entry
    from loramux.train.joint.trainer import JointTrainer

log = logging.getLogger(__name__)


def save(trainer: JointTrainer, store: CheckpointStore) -> None:
    """Write a state of all jobs that a run can go on from."""
    tensors: dict[str, Any] = {}
    rows = []
    for i, entry in enumerate(trainer.entries.values()):
        rows.append(_row(entry))
        if entry.runner is not None:
            groups = entry.runner.tensors()
            tensors |= {f"{i}.{group}": content for group, content in groups.items()}
    meta = {"round": trainer.round, **_identity(trainer), "jobs": rows}
    meta |= {"max_tokens": trainer.calls.max_tokens, "seen": trainer.calls.seen}
    if trainer.guard is not None:
        meta["memory"] = trainer.guard.state()
    store.save(trainer.round, meta, tensors)
    for runner in trainer.runners:
        trainer._write_history(runner)


def _row(entry: Entry) -> dict[str, Any]:
    runner, result = entry.runner, entry.result
    return {
        "name": entry.name,
        "identity": entry.identity,
        "priority": entry.priority,
        "last_round": entry.last_round,
        "joined": entry.joined,
        "is_paused": entry.is_paused,
        "is_held": entry.is_held,
        "state": None if runner is None else runner.saved_state(),
        "num_steps": None if runner is None else runner.num_steps,
        "result": None if result is None else asdict(result),
    }


def _identity(trainer: JointTrainer) -> dict[str, Any]:
    from loramux.persist import digest_of_base

    if trainer._identity is None:
        trainer._identity = {"base": digest_of_base(trainer.model)}
    return trainer._identity


def restore(trainer: JointTrainer, store: CheckpointStore, resume: bool) -> None:
    """Go on from the last whole state, if there is one and it was asked for."""
    if not resume:
        if store.numbers() or trainer.journal.rows:
            raise CheckpointError(
                f"{store.folder} holds states of an earlier run; resume it or choose another folder"
            )
        return
    saved = store.newest()
    if saved is None:
        return
    _check(trainer, saved, store)
    trainer.round = int(saved.meta["round"])
    trainer.calls.max_tokens = int(saved.meta["max_tokens"])
    trainer.calls.seen = list(saved.meta.get("seen", [0, 0]))
    if trainer.guard is not None and "memory" in saved.meta:
        trainer.guard.restore(saved.meta["memory"])
    added = trainer.journal.added(trainer.round)
    for i, row in enumerate(saved.meta["jobs"]):
        if row["name"] not in trainer.entries and row["result"] is None:
            command = added.get(row["name"])
            if command is None or trainer.load is None:
                raise CheckpointError(
                    f"{store.folder} holds a job {row['name']!r} that was added while it ran, and nothing here says "
                    "what it is; go on with the command that started the run"
                )
            trainer.admit(trainer.prepare(trainer.load(command.value)))
        prefix = f"{i}."
        groups = {
            name.removeprefix(prefix): group
            for name, group in saved.tensors.items()
            if name.startswith(prefix)
        }
        _restore_one(trainer, row, groups)
    # In the order in which they came, whatever was loaded first.
    order = {row["name"]: i for i, row in enumerate(saved.meta["jobs"])}
    for row in saved.meta["jobs"]:  # taking ended jobs off has let those go that wait for memory
        trainer.entries[row["name"]].is_held = bool(row.get("is_held", False))
    trainer.entries = dict(sorted(trainer.entries.items(), key=lambda item: order[item[0]]))
    for arrival, entry in enumerate(trainer.entries.values()):
        entry.arrival = arrival
    log.info("going on after round %d", trainer.round)


def _check(trainer: JointTrainer, saved: Saved, store: CheckpointStore) -> None:
    """The base and every job of the command must be those of the state."""
    there = {row["name"]: row["identity"] for row in saved.meta["jobs"]}
    was = {"base": saved.meta["base"], "jobs": {name: there.get(name) for name in trainer.entries}}
    now = {
        **_identity(trainer),
        "jobs": {name: entry.identity for name, entry in trainer.entries.items()},
    }
    refuse_other(was, _plain(now), store.folder.parent)


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    import json

    return json.loads(json.dumps(value, default=str))


def _restore_one(trainer: JointTrainer, row: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
    from loramux.train.joint.entry import Entry

    entry = trainer.entries.get(row["name"])
    if entry is None:
        entry = Entry(row["name"], 0, int(row["priority"]), dict(row["identity"]), None)
        trainer.entries[entry.name] = entry
    entry.priority = int(row["priority"])
    entry.last_round = int(row["last_round"])
    entry.joined = int(row.get("joined", 0))
    entry.is_paused = bool(row["is_paused"])
    if row["result"] is None:
        assert entry.runner is not None
        entry.runner.restore(row["state"], groups)
        entry.from_step = entry.runner.state.step
        return
    if entry.runner is not None:
        trainer.leave(entry)
    entry.result = JobResult(**row["result"])
