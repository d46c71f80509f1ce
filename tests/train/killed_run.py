"""A child of test_resume: trains on a tiny model in forked processes that kill themselves, then goes on.

Forked, because importing torch anew for every kill would take most of the time.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import loramux
from loramux.core.method import MethodConfig
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from pico import PAD, build_pico
from train.editing import Moving
from train.toys import examples


class KillAt(Listener):
    """Kills the process after a step, or at a validation (the best adapter is written, the state is not)."""

    def __init__(self, step: int = 0, validation: int = 0):
        self.step = step
        self.validation = validation

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            die()

    def validated(self, trainer: Trainer, job: str, step: int, loss: float, is_best: bool) -> None:
        if step == self.validation:
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_a_state_is_written(out: Path) -> None:
    """At the moment the second state would be renamed into place."""
    original = os.replace

    def replace(source: str | Path, target: str | Path) -> None:
        if Path(target) == out / "checkpoints" / "00000006":
            die()
        original(source, target)

    os.replace = replace  # type: ignore[assignment]


def attached(base: nn.Module, kind: str) -> loramux.Handle:
    """An adapter `a`: a mixture, one whose ranks compete, or one whose ranks move between linears."""
    config: MethodConfig = loramux.LoraConfig(r=2, lora_dropout=0.1)
    if kind == "mixlora":
        config = loramux.MixLoRAConfig(r=4, num_experts=4, lora_dropout=0.1, jitter_noise=0.1)
    if kind == "beamlora":
        config = loramux.BeamLoRAConfig(r=4, interval=2, end_step=9, top_p=0.5)
    handle = loramux.attach(base, config, name="a")
    if kind == "moving":
        handle.adapters["a"].method.controller = Moving  # type: ignore[method-assign, assignment]
    return handle


def run(kind: str, out: Path, *listeners: Listener) -> None:
    torch.manual_seed(0)
    base = build_pico("llama")
    handle = attached(base, kind)
    training = TrainingConfig(
        steps=10,
        learning_rate=1e-2,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        eval_every=4,
        save_every=3,
    )
    job = Job(
        "a",
        train=examples(40),
        validation=examples(8, seed=1),
        training=training,
        seed=5,
        pad_token_id=PAD,
    )
    Trainer(base, handle, [job], out=out, resume=True, listeners=listeners).run()


def in_child(work: Callable[[], None]) -> int:
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


def main(folder: Path, kind: str) -> None:
    kills: dict[str, Callable[[Path], None]] = {
        "after a step": lambda out: run(kind, out, KillAt(step=5)),
        "at a validation": lambda out: run(kind, out, KillAt(validation=8)),
        "while a state is written": lambda out: (
            die_while_a_state_is_written(out),
            run(kind, out),
        )[1],
        "before the first state": lambda out: run(kind, out, KillAt(step=2)),
    }
    status: dict[str, list[int]] = {"unbroken": [in_child(lambda: run(kind, folder / "unbroken"))]}
    for name, kill in kills.items():
        out = folder / name
        status[name] = [in_child(lambda k=kill, o=out: k(o)), in_child(lambda o=out: run(kind, o))]
    (folder / "status.json").write_text(json.dumps(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[2:]:
        (Path(sys.argv[1]) / each).mkdir()
        main(Path(sys.argv[1]) / each, each)
