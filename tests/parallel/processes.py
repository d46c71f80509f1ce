"""A child of the tests here: runs on a tiny model, by one process and by two that meet over loopback.

    processes.py FOLDER [NAME ...]    only runs whose names begin so

Each run is forked, so that only one interpreter is started; `FOLDER/NAME/RANK.json` is what process RANK saw, and
RANK.safetensors the adapters it ended with.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from joint.jobs import METHODS, Seen, attached, job, tiny, weights
from loramux.data import Example
from loramux.train import Listener, StepEvent, Trainer
from loramux.train.joint import Command, JointTrainer
from loramux.train.parallel import Group, connected

STEPS = 20
NAMES = ["lora", "mixlora", "smora"]
DOUBLE = torch.float64
Act = Callable[[Path, Group | None], None]


def made(name: str, **changes: Any) -> Any:
    """Two micro-batches per step, with dropout, jitter and losses of load."""
    options = {"steps": STEPS, "gradient_accumulation_steps": 2, "micro_batch_size": 2}
    options |= {"validation": job(name).train[:5], "eval_every": 7, "save_every": 4}
    return job(name, **(options | changes))


def note(folder: Path, group: Group | None, handle: Any, seen: Seen, results: Any) -> None:
    rank = 0 if group is None else group.rank
    plain = [{k: v for k, v in asdict(one).items() if k != "adapter"} for one in results]
    folder.mkdir(parents=True, exist_ok=True)
    found = {"losses": seen.losses, "norms": seen.norms, "results": plain}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    tensors = {
        f"{name} {key}": value.contiguous()
        for name in handle.adapters
        for key, value in weights(handle, name).items()
    }
    save_file(tensors, folder / f"{rank}.safetensors")


def turns(folder: Path, group: Group | None) -> None:
    base = tiny(dtype=DOUBLE)
    handle, seen = attached(base, NAMES, DOUBLE), Seen()
    jobs = [made(name) for name in NAMES]
    results = Trainer(base, handle, jobs, listeners=(seen,), group=group).run()
    note(folder, group, handle, seen, results)


def rows(folder: Path, group: Group | None) -> None:
    """One micro-batch per step: its rows are shared."""
    base = tiny(dtype=DOUBLE)
    handle = attached(base, ["dora"], DOUBLE)
    adapter = handle.adapters["dora"]
    object.__setattr__(adapter.method.config, "lora_dropout", 0.0)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen, each = Seen(), made("dora", gradient_accumulation_steps=1, micro_batch_size=4)
    results = Trainer(base, handle, [each], listeners=(seen,), group=group).run()
    note(folder, group, handle, seen, results)


class Script:
    """Commands by round, as the first process hears them; another process has nothing to ask."""

    stays_open = False

    def __init__(self, is_first: bool):
        self.polled, self.is_first = 0, is_first
        self.answers: list[str] = []

    def poll(self) -> Sequence[Command]:
        self.polled += 1
        if not self.is_first:
            raise AssertionError("only the first process hears commands")
        script = {
            2: [Command("pause", "lora"), Command("pause", "nobody")],
            5: [Command("resume", "lora"), Command("add", "milora", "milora")],
        }
        return script.get(self.polled, ())

    def answered(self, command: Command, problem: str) -> None:
        self.answers.append(problem)


def together(folder: Path, group: Group | None, stop: int = 0, out: Path | None = None) -> None:
    base = tiny(dtype=DOUBLE)
    names = [*NAMES, "dora"]
    handle, seen = attached(base, names, DOUBLE), Seen()

    def load(name: str) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            handle.add(METHODS[name], name=name).to(DOUBLE)
        return made(name, steps=8)

    inbox = None if out else Script(group is None or group.is_first)
    # A row of another vocabulary: its job fails where it is run, and must have failed everywhere.
    bad = [*job("dora").train[:20], *[Example.build("toy", [7, 500], [False, True])] * 4]
    jobs = [made(name) for name in NAMES]
    jobs.append(made("dora", train=bad, validation=(), eval_every=None))
    trainer = JointTrainer(
        base, handle, jobs, out=out, resume=True, listeners=(seen, Stop(stop)), inbox=inbox,
        load=load, group=group,
    )  # fmt: skip
    results = trainer.run()
    if inbox is not None:
        assert not inbox.is_first or inbox.answers[:2] == [
            "",
            f"no job named 'nobody'; there are {names}",
        ], inbox.answers
    note(folder, group, handle, seen, results)


class Stop(Listener):
    """Asks one process to stop; 0: nobody. Both must."""

    def __init__(self, number: int):
        self.number = number

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        is_last = trainer.team is None or trainer.team.group.rank == trainer.team.group.size - 1
        if trainer.round == self.number and is_last:
            trainer.stop()


def dying(folder: Path, group: Group | None) -> None:
    class Die(Listener):
        def stepped(self, trainer: Trainer, event: StepEvent) -> None:
            assert group is not None
            if trainer.round == 3 and not group.is_first:
                os._exit(9)

    base = tiny()
    handle = attached(base, ["lora"])
    JointTrainer(base, handle, [made("lora")], listeners=(Die(),), group=group).run()


def unlike(folder: Path, group: Group | None) -> None:
    """The second process reads other data of as many rows."""
    assert group is not None
    base = tiny()
    handle = attached(base, ["lora"])
    with torch.no_grad():
        next(iter(handle.adapters["lora"].trainable().values())).add_(group.rank)
    Trainer(base, handle, [made("lora")], group=group).run()


def pieces(folder: Path, group: Group | None) -> None:
    """The base laid out over the processes, by turns and together; unequal numbers of calls."""
    for how in (Trainer, JointTrainer):
        base = tiny(dtype=DOUBLE)
        handle, seen = attached(base, ["lora", "mixlora"], DOUBLE), Seen()
        plain = {"save_every": None, "validation": job("lora").train[:5]}
        jobs = [
            made("lora", gradient_accumulation_steps=3, steps=6, **plain),
            made("mixlora", gradient_accumulation_steps=1, steps=6, **plain),
        ]
        out = folder / how.__name__ / "out"
        results = how(base, handle, jobs, out=out, listeners=(seen,), group=group).run()
        if group is not None:
            local = sum(p.to_local().numel() for p in base.parameters() if hasattr(p, "to_local"))
            whole = sum(p.numel() for p in base.parameters() if hasattr(p, "to_local"))
            assert 0 < local < whole
        note(folder / how.__name__, group, handle, seen, results)


def launch(folder: Path, act: Act, size: int, shards_base: bool = False) -> list[int]:
    """Exit codes of `size` forked processes; what they raised is in RANK.error."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "LORAMUX_PARALLEL_SECONDS": "60"}
    pids = []
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.update(env | {"RANK": str(rank)})
                with connected(shards_base and size > 1) as group:
                    act(folder, group)
                os._exit(0)
            except BaseException as error:
                (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(folder: Path, only: Sequence[str] = ()) -> None:
    codes: dict[str, list[int]] = {}

    def run(name: str, act: Act, size: int, shards_base: bool = False) -> None:
        if not only or name.startswith(tuple(only)):
            codes[name] = launch(folder / name, act, size, shards_base)

    for size in (1, 2):
        run(f"turns-{size}", turns, size)
        run(f"rows-{size}", rows, size)
        run(f"together-{size}", together, size)
        run(f"pieces-{size}", pieces, size, shards_base=True)
    for name, sizes in {"unbroken": (1,), "grown": (1, 2), "shrunk": (2, 1)}.items():
        out = folder / f"out-{name}"
        for part, size in enumerate(sizes):
            stop = 6 if part + 1 < len(sizes) else 0

            def go(at: Path, group: Group | None, stop: int = stop, out: Path = out) -> None:
                together(at, group, stop, out)

            run(f"{name}-{part}", go, size)
    run("dying", dying, 2)
    run("unlike", unlike, 2)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
