"""Several jobs of short rows, trained together, against one after the other in PEFT and in loramux.

A round is one optimizer step of every job, by the trainers themselves: batches, schedule, clipping and optimizer are
part of it. PEFT's is a bare loop of a model that takes one job's rows after the other's, without loading or saving in
between, which is the least that training them in turn costs. The first half of every row is not supervised.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.adapters import RANK
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort, build_base, copy_of
from loramux.bench.table import Compared, Measured, compare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loramux.train import Job

STEPS = 10_000  # of a job: more than are ever timed
JOINT, TURNS, PEFT = "together in loramux", "in turn in loramux", "in turn in PEFT"


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
SMALL_LOADS = (Load(3, 2, 8, "8 jobs/peft"),)


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

    def __init__(self, base: PreTrainedModel, load: Load, joint: bool):
        from loramux.train import Trainer
        from loramux.train.joint import JointTrainer

        jobs = make_jobs(load, base.config.vocab_size)
        config = loramux.LoraConfig(r=RANK, lora_alpha=2 * RANK)
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

    def __call__(self) -> float:
        return cpu_seconds(self.step)


class Peft:
    """One PEFT model, one AdamW, and every job's rows in turn; `at_once`: all of them in one batch."""

    def __init__(self, base: PreTrainedModel, load: Load, at_once: bool = False):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
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


def measure(effort: Effort, folder: str | None, begin: Begin) -> Measured:
    """Rows for all loads; times are CPU time of paired rounds."""
    found = Measured()
    base = build_base(effort.shape, folder)
    for load in SMALL_LOADS if effort.is_quick else LOADS:
        subjects: dict[str, Measure] = {
            JOINT: Rounds(copy_of(base), load, joint=True),
            TURNS: Rounds(copy_of(base), load, joint=False),
            PEFT: Peft(copy_of(base), load),
        }
        advance = begin(load.title, (effort.train_rounds + 1) * len(subjects))
        seconds = interleave(subjects, effort.train_rounds, done=advance)
        titles = {name: f"{load.title}, {name}" for name in subjects}
        wanted = (
            Compared("jobs", JOINT, PEFT, load.target, adapters=load.jobs),
            Compared("jobs", TURNS, PEFT, adapters=load.jobs),
            Compared("jobs", JOINT, TURNS, adapters=load.jobs),
        )
        found.rows += compare(seconds, titles, wanted, batch=load.jobs * load.rows, per_call=1)
    return found
