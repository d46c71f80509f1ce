"""Several jobs of short rows, trained together, against one after the other in PEFT and in loramux.

A round is one optimizer step of every job, by the trainers themselves: batches, schedule, clipping and optimizer are
part of it. PEFT's is a bare loop of a model that takes one job's rows after the other's, without loading or saving in
between, which is the least that training them in turn costs. The first half of every row is not supervised.

A MixLoRA job is compared with a LoRA job of its active rank: two experts of rank 8 act on a token, so rank 16.
Memory is in `joint_memory.py`, what a run spends beside training in `joint_overhead.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.adapters import RANK
from loramux.bench.apart import Apart
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, Shape, build_base
from loramux.bench.table import Compared, Measured, Row, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loramux.train import Job

STEPS = 10_000  # of a job: more than are ever timed
JOINT, TURNS, PEFT = "together in loramux", "in turn in loramux", "in turn in PEFT"
MIXLORA, LORA_16, PEFT_16 = "MixLoRA 8 experts top-2", "LoRA r=16", "LoRA r=16 in PEFT"
ACTIVE_RANK = 16


@dataclass(frozen=True)
class Load:
    """So many jobs, each with so many rows of so many tokens per step."""

    jobs: int
    rows: int
    tokens: int
    target: str

    @property
    def title(self) -> str:
        noun = "job" if self.jobs == 1 else "jobs"
        return f"{self.jobs} {noun} of {self.rows} x {self.tokens} tokens"


LOADS = (
    Load(8, 2, 32, "8 jobs/peft"),
    Load(4, 2, 128, "4 jobs/peft"),
    Load(1, 8, 128, "1 job/peft"),
)
SMALL_LOADS = (Load(3, 2, 8, "8 jobs/peft"), Load(1, 2, 8, "1 job/peft"))


def make_jobs(load: Load, vocab: int) -> list[Job]:
    """Random rows, other ones for every job; their second halves are supervised."""
    from loramux.data import Example
    from loramux.recipe import TrainingConfig
    from loramux.train import Job

    training = TrainingConfig(
        steps=STEPS, micro_batch_size=load.rows, scheduler="constant", log_every=10
    )
    generator = torch.Generator().manual_seed(0)
    supervised = [i >= load.tokens // 2 for i in range(load.tokens)]
    jobs = []
    for number in range(load.jobs):
        rows = torch.randint(vocab, (4 * load.rows, load.tokens), generator=generator).tolist()
        examples = [Example.build("bench", row, supervised) for row in rows]
        jobs.append(Job(f"job{number}", train=examples, training=training, seed=number))
    return jobs


class Rounds:
    """The jobs with a trainer of loramux; a call gives the seconds of one round."""

    def __init__(self, base: PreTrainedModel, load: Load, joint: bool, config: Any = None):
        from loramux.train import Trainer
        from loramux.train.joint import JointTrainer

        jobs = make_jobs(load, base.config.vocab_size)
        config = config or loramux.LoraConfig(r=RANK, lora_alpha=2 * RANK)
        self.handle = loramux.attach(base, config, name=jobs[0].name)
        for job in jobs[1:]:
            self.handle.add(config, name=job.name)
        make = JointTrainer if joint else Trainer
        self.trainer = make(base, self.handle, jobs)
        self._open = ExitStack()
        self._open.enter_context(self.trainer.training_mode())

    def step(self) -> None:
        self.trainer.round += 1
        self.trainer.take_round()

    def close(self) -> None:
        """The model as it was."""
        self._open.close()

    def __call__(self) -> float:
        return cpu_seconds(self.step)


class Peft:
    """One PEFT model, one AdamW, and every job's rows in turn; `at_once`: all of them in one batch."""

    def __init__(self, base: PreTrainedModel, load: Load, at_once: bool = False, rank: int = RANK):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.model: Any = get_peft_model(base, config).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        jobs = make_jobs(load, base.config.vocab_size)
        batches = [_batch(job, load) for job in jobs]
        if at_once:
            batches = [{key: torch.cat([b[key] for b in batches]) for key in batches[0]}]
        self.batches = batches

    def step(self) -> None:
        for batch in self.batches:
            self.model(**batch, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def __call__(self) -> float:
        return cpu_seconds(self.step)


def _batch(job: Job, load: Load) -> dict[str, torch.Tensor]:
    from loramux.data import collate

    batch = collate(job.train[: load.rows], 0)
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def make_subject(name: str, load: Load, shape: Shape, folder: str | None) -> Measure:
    """What is timed, over a base of its own; in a process of its own nothing else says how many threads."""
    torch.set_num_threads(1)
    base = build_base(shape, folder)
    makers: Mapping[str, Callable[[], Measure]] = {
        JOINT: lambda: Rounds(base, load, joint=True),
        TURNS: lambda: Rounds(base, load, joint=False),
        PEFT: lambda: Peft(base, load),
        MIXLORA: lambda: Rounds(base, load, joint=False, config=_mixlora()),
        LORA_16: lambda: Rounds(base, load, joint=False, config=_lora(ACTIVE_RANK)),
        PEFT_16: lambda: Peft(base, load, rank=ACTIVE_RANK),
    }
    return makers[name]()


def _lora(rank: int) -> loramux.LoraConfig:
    return loramux.LoraConfig(r=rank, lora_alpha=2 * rank)


def _mixlora() -> loramux.MixLoRAConfig:
    # Its default dropout off: the LoRA it is compared with has none.
    return loramux.MixLoRAConfig(
        r=RANK, lora_alpha=2 * RANK, num_experts=8, top_k=2, lora_dropout=0.0
    )


def measure(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    """Rows for all loads; times are CPU time of paired rounds, every subject in its own process."""
    from loramux.bench.joint_memory import memory_rows
    from loramux.bench.joint_overhead import overhead_rows

    loads = SMALL_LOADS if effort.is_quick else LOADS
    found = Measured()
    for load in loads:
        found.rows += _speed_rows(load, effort, folder, begin)
    found.rows += memory_rows(loads[0], effort, folder, begin)
    found.rows += overhead_rows(loads[0], effort, folder, begin)
    return found


def _speed_rows(load: Load, effort: Effort, folder: str | None, begin: Begin) -> list[Row]:
    several, one = (JOINT, TURNS, PEFT), (JOINT, PEFT, MIXLORA, LORA_16, PEFT_16)
    names = several if load.jobs > 1 else one
    with ExitStack() as stack:
        subjects: dict[str, Measure] = {}
        for name in names:
            given = (name, load, effort.shape, folder)
            if effort.is_quick:
                subjects[name] = made = make_subject(*given)
                stack.callback(getattr(made, "close", lambda: None))
            else:
                subjects[name] = stack.enter_context(Apart(make_subject, *given))
        advance = begin(load.title, (effort.joint_rounds + 1) * len(subjects))
        seconds = interleave(subjects, effort.joint_rounds, done=advance)
    titles = {name: f"{load.title}, {name}" for name in subjects}
    wanted = (
        Compared("jobs", JOINT, PEFT, load.target, adapters=load.jobs),
        Compared("jobs", TURNS, PEFT, adapters=load.jobs),
        Compared("jobs", JOINT, TURNS, adapters=load.jobs),
        Compared("jobs", MIXLORA, LORA_16, "mixlora job/lora"),
        Compared("jobs", MIXLORA, PEFT_16, "mixlora job/lora"),
    )
    return compare(seconds, titles, wanted, batch=load.jobs * load.rows, per_call=1)
