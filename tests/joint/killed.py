"""A child of test_resume: joint runs on a tiny model in forked processes that kill themselves, then go on.

    killed.py FOLDER [NUM_POINTS]

Without a number: one kill after a step, one while a state is renamed into place, one between a command's journal line
and its round. With one: as many kills after steps, spread over the run at random.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from joint.jobs import METHODS, attached, job, tiny
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import Command, JointTrainer
from loramux.train.joint.commands import Journal

NAMES = ["lora", "mixlora", "smora"]
STEPS = {"lora": 7, "mixlora": 9, "smora": 6, "milora": 4}
SAVE_EVERY = 3


class Arrivals:
    """One job comes before the sixth round; another is paused for three."""

    stays_open = False
    script: dict[int, list[Command]]

    def __init__(self, trainer_round: Callable[[], int]):
        self.round = trainer_round
        self.script = {
            3: [Command("pause", "lora")],
            6: [Command("resume", "lora"), Command("add", "milora", "milora")],
        }

    def poll(self) -> Sequence[Command]:
        return self.script.pop(self.round(), ())

    def answered(self, command: Command, problem: str) -> None:
        assert not problem, problem


class KillAfter(Listener):
    """After so many steps of all jobs together."""

    def __init__(self, steps: int):
        self.left = steps

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        self.left -= 1
        if self.left == 0:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_a_state_is_written(out: Path) -> None:
    original = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        if Path(target) == out / "checkpoints" / f"{2 * SAVE_EVERY:08d}":
            die()
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def die_when_a_command_is_written_down() -> None:
    original = Journal.append

    def append(self: Journal, number: int, command: Command) -> None:
        original(self, number, command)
        if command.what == "add":
            die()

    Journal.append = append  # type: ignore[method-assign]


def run(out: Path, *listeners: Listener) -> None:
    base = tiny()
    handle = attached(base, NAMES)

    def load(name: str) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            handle.add(METHODS[name], name=name)
        return made(name)

    def made(name: str) -> Any:
        return job(
            name, steps=STEPS[name], save_every=SAVE_EVERY, micro_batch_size=2,
            validation=job(name).train[:3], eval_every=5,
        )  # fmt: skip

    trainer: JointTrainer
    inbox = Arrivals(lambda: trainer.round)
    trainer = JointTrainer(
        base, handle, [made(name) for name in NAMES],
        out=out, resume=True, listeners=listeners, inbox=inbox, load=load,
    )  # fmt: skip
    trainer.run()


def in_child(work: Callable[[], object]) -> int:
    """The exit status of a forked process that does `work`."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(folder: Path, number: int) -> dict[str, Callable[[Path], object]]:
    if number:
        points = random.Random(0).sample(range(1, sum(STEPS.values())), number)
        return {f"after {at} steps": lambda out, at=at: run(out, KillAfter(at)) for at in points}  # type: ignore[misc]

    def renaming(out: Path) -> None:
        die_while_a_state_is_written(out)
        run(out)

    def writing_down(out: Path) -> None:
        die_when_a_command_is_written_down()
        run(out)

    return {
        "after a step": lambda out: run(out, KillAfter(15)),
        "while a state is written": renaming,
        "with a command written down": writing_down,
    }


def main(folder: Path, number: int) -> None:
    status = {"unbroken": [in_child(lambda: run(folder / "unbroken"))]}
    for name, kill in kills(folder, number).items():
        out = folder / name
        status[name] = [in_child(lambda k=kill, o=out: k(o)), in_child(lambda o=out: run(o))]  # type: ignore[misc]
    (folder / "status.json").write_text(json.dumps(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
