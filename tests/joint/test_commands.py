"""Jobs are added, paused, prioritised and cancelled while a run goes on, and it does the same again when resumed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from joint.jobs import Seen, attached, job, solo_of, tiny, weights
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import Candidate, Command, JointTrainer, RoundRobin
from loramux.train.joint.commands import Journal

DOUBLE = torch.float64


class Scripted:
    """Gives commands before chosen rounds."""

    stays_open = False

    def __init__(self, script: dict[int, list[Command]]):
        self.script = script
        self.polled = 0
        self.answers: list[tuple[Command, str]] = []

    def poll(self) -> Sequence[Command]:
        self.polled += 1
        return self.script.pop(self.polled, ())

    def answered(self, command: Command, problem: str) -> None:
        self.answers.append((command, problem))


class Order(Listener):
    """Who stepped in which round."""

    def __init__(self) -> None:
        self.rounds: dict[int, list[str]] = {}

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.rounds.setdefault(trainer.round, []).append(event.job)


def trainer(
    names: list[str],
    script: dict[int, list[Command]],
    *listeners: Listener,
    steps: int = 6,
    **options: Any,
) -> tuple[JointTrainer, Scripted]:
    base = tiny(dtype=DOUBLE)
    handle = attached(base, names, DOUBLE)
    inbox = Scripted(script)

    def load(value: Any) -> Any:
        attached_to(handle, value["name"])
        return job(value["name"], steps=value["steps"])

    jobs = [job(name, steps=steps) for name in names]
    made = JointTrainer(base, handle, jobs, listeners=listeners, inbox=inbox, load=load, **options)
    return made, inbox


def attached_to(handle: Any, name: str) -> None:
    """As `attached` adds it."""
    from joint.jobs import METHODS

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(METHODS).index(name))
        adapter = handle.add(METHODS[name], name=name).to(DOUBLE)
        with torch.no_grad():
            for parameter in adapter.trainable().values():
                parameter.add_(0.05 * torch.randn(parameter.shape))


def same_as_solo(handle: Any, name: str, steps: int = 6) -> None:
    want, _ = solo_of(name, steps)
    for key, value in weights(handle, name).items():
        torch.testing.assert_close(value, want[key], rtol=0, atol=1e-9, msg=f"{name} {key}")


def test_a_job_that_arrives_later_trains_as_it_would_alone() -> None:
    order = Order()
    add = Command("add", "smora", {"name": "smora", "steps": 6})
    run, inbox = trainer(["lora", "milora"], {3: [add]}, order)
    results = run.run()
    assert [result.name for result in results] == ["lora", "milora", "smora"]
    assert inbox.answers == [(add, "")]
    assert order.rounds[3] == ["smora", "lora", "milora"]  # it has waited longest
    for name in ("lora", "milora", "smora"):
        same_as_solo(run.handle, name)


def test_a_paused_job_waits_and_goes_on_where_it_stood() -> None:
    order = Order()
    run, _ = trainer(
        ["lora", "milora"],
        {2: [Command("pause", "lora")], 4: [Command("resume", "lora")]},
        order,
    )
    run.run()
    assert order.rounds[2] == order.rounds[3] == ["milora"]
    assert "lora" in order.rounds[4]
    same_as_solo(run.handle, "lora")
    same_as_solo(run.handle, "milora")


def test_a_run_whose_jobs_are_all_paused_waits_for_one_to_be_resumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loramux.train.joint.trainer.POLL_SECONDS", 0.0)
    run, inbox = trainer(["lora"], {2: [Command("pause", "lora")], 9: [Command("resume", "lora")]})
    (result,) = run.run()
    assert result.status == "finished"
    assert inbox.polled >= 9


def test_a_cancelled_job_keeps_its_adapter_and_its_neighbours_do_not_notice(tmp_path: Path) -> None:
    run, _ = trainer(["lora", "milora"], {4: [Command("cancel", "lora")]}, out=tmp_path / "run")
    results = {result.name: result for result in run.run()}
    assert results["lora"].status == "cancelled"
    assert results["lora"].steps == 3
    assert (tmp_path / "run" / "lora" / "adapter").is_dir()
    assert results["milora"].status == "finished"
    assert not run.handle.adapters  # written, so taken off


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (Command("pause", "nobody"), "no job named 'nobody'; there are"),
        (Command("add", "lora", {}), "a job named 'lora' is in this run"),
        (Command("add", "new", {"name": "milora", "steps": 2}), "an adapter named 'milora'"),
    ],
)
def test_commands_that_cannot_be_obeyed_are_refused_with_the_reason(
    command: Command, reason: str
) -> None:
    run, inbox = trainer(["lora", "milora"], {2: [command]}, steps=3)
    results = run.run()
    assert [result.status for result in results] == ["finished"] * 2
    assert reason in inbox.answers[0][1]


def test_higher_priority_goes_first_and_equals_take_turns() -> None:
    def job(name: str, priority: int, arrival: int, last: int, tokens: int = 10) -> Candidate:
        return Candidate(name, priority, arrival, tokens, last)

    ready = [job("a", 0, 0, 3), job("b", 0, 1, 2), job("c", 5, 2, 3), job("d", 0, 3, 2)]
    assert RoundRobin().pick(4, ready) == ["c", "b", "d", "a"]
    assert RoundRobin(25).pick(4, ready) == ["c", "b"]
    assert RoundRobin(1).pick(4, ready) == ["c"]
    large = [job("wide", 1, 0, 0, tokens=90), job("small", 0, 1, 0, tokens=10)]
    assert RoundRobin(100).pick(1, large) == ["wide", "small"]
    assert RoundRobin(95).pick(1, large) == ["wide"]


def test_with_room_for_one_job_per_round_nobody_starves() -> None:
    order = Order()
    run, _ = trainer(["lora", "milora", "smora"], {}, order, steps=3, scheduler=RoundRobin(1))
    run.run()
    assert [names for _, names in sorted(order.rounds.items())] == [
        [name] for name in ("lora", "milora", "smora") * 3
    ]


def test_a_new_priority_counts_from_the_next_round() -> None:
    order = Order()
    run, _ = trainer(
        ["lora", "milora"],
        {3: [Command("priority", "milora", 9)]},
        order,
        steps=4,
        scheduler=RoundRobin(1),
    )
    run.run()
    turns = [names[0] for _, names in sorted(order.rounds.items())]
    assert turns == ["lora", "milora", "milora", "milora", "milora", "lora", "lora", "lora"]


def test_a_resumed_run_obeys_in_the_rounds_in_which_it_obeyed(tmp_path: Path) -> None:
    def script() -> dict[int, list[Command]]:
        return {
            3: [Command("add", "smora", {"name": "smora", "steps": 5})],
            4: [Command("pause", "milora")],
            6: [Command("resume", "milora"), Command("cancel", "lora")],
        }

    class Broken(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            if trainer.round == 6:
                raise KeyboardInterrupt

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    first, second = Order(), Order()
    want = trainer(["lora", "milora"], script(), first, steps=9, out=unbroken)[0].run()
    died, _ = trainer(["lora", "milora"], script(), Broken(), steps=9, out=broken)
    with pytest.raises(KeyboardInterrupt):
        died.run()
    # No state was written: all is done again, from the journal alone.
    again, inbox = trainer(["lora", "milora"], {}, second, steps=9, out=broken, resume=True)
    have = again.run()
    assert first.rounds == second.rounds
    assert inbox.polled == max(second.rounds) - 6
    for one, two in zip(want, have, strict=True):
        assert (one.name, one.status, one.steps) == (two.name, two.status, two.steps)
        mine, other = (folder / one.name / "adapter" for folder in (unbroken, broken))
        for path in mine.glob("**/*.safetensors"):
            assert path.read_bytes() == (other / path.relative_to(mine)).read_bytes()


def test_a_journal_line_that_was_cut_short_was_not_obeyed(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(2, Command("pause", "a"))
    journal.append(5, Command("add", "b", {"name": "b"}))
    path.write_text(path.read_text()[:-7])
    again = Journal(path)
    assert again.rows == [(2, Command("pause", "a"))]
    again.append(6, Command("resume", "a"))
    assert [row["round"] for row in map(json.loads, path.read_text().splitlines())] == [2, 6]


def test_listeners_hear_of_jobs_that_join(tmp_path: Path) -> None:
    from loramux.train.board import TensorBoard
    from loramux.train.logs import RoutingLog
    from loramux.train.progress import PlainProgress

    lines: list[str] = []

    class Stream:
        write: Callable[[str], None] = staticmethod(lines.append)

        def flush(self) -> None: ...

    add = Command("add", "mixlora", {"name": "mixlora", "steps": 3})
    run, _ = trainer(
        ["lora"],
        {2: [add]},
        Seen(),
        TensorBoard(tmp_path / "board"),
        RoutingLog(),
        PlainProgress(Stream()),
        steps=4,
        out=tmp_path / "run",
    )
    run.run()
    for name in ("lora", "mixlora"):
        assert list((tmp_path / "board" / name).glob("events.*"))
        assert any(line.startswith(f"{name}: step") for line in lines)
    assert (tmp_path / "run" / "mixlora" / "routing.jsonl").read_text().count("\n") == 3
