"""Runs one job: its steps, its validations, and what has to be written down of it.

A step: collated micro-batches -> forward -> cross-entropy in fp32, summed and divided by the supervised tokens of the
whole step -> plus auxiliary losses, weighted by the micro-batch's share of those tokens -> backward -> clip -> AdamW.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loramux.data import Example, collate
from loramux.train.attention import fastest_attention
from loramux.train.control import Control, Schedule
from loramux.train.events import StepEvent
from loramux.train.job import Job, JobState
from loramux.train.loss import SupervisedForward, num_tokens
from loramux.train.objective import means_of, objective_of
from loramux.train.optim import (
    clip,
    load_optimizer_tensors,
    lr_factor,
    make_optimizer,
    optimizer_tensors,
    set_lr,
)
from loramux.train.rng import States, running_with, seeded_states
from loramux.train.stopping import Stopping

if TYPE_CHECKING:
    from loramux.api import Handle

log = logging.getLogger(__name__)
SPEED_STEPS = 20  # tokens per second are shown over so many steps


class JobRunner:
    """Owns everything of a job that changes; touches no parameter but its own adapter's."""

    def __init__(self, job: Job, model: nn.Module, handle: Handle, forward: SupervisedForward):
        self.job = job
        self.model = model
        self.handle = handle
        self.forward = forward
        self.objective = objective_of(job, handle, forward)
        self.adapter = handle.adapters[job.name]
        self._check_tasks()
        some = next(model.parameters())
        self.device, self.dtype = some.device, some.dtype
        self.parameters = handle.trainable_parameters(job.name)
        self.optimizer = make_optimizer(self.parameters, job.training)
        rate = job.training.learning_rate
        self.peak_lr = self.adapter.method.default_learning_rate if rate is None else rate
        self.plan = job.plan()
        self.num_steps = job.num_steps(self.plan)
        self.state = JobState()
        self.best: dict[str, Tensor] | None = None
        self.rng = seeded_states(job.seed, self.device)
        self.control = Control(
            handle, self.adapter, self.optimizer, self.parameters, self._schedule(),
            seed=job.seed, samples=self._samples,
        )  # fmt: skip
        self._new_edits: list[dict[str, Any]] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=SPEED_STEPS)

    @property
    def is_running(self) -> bool:
        return self.state.status == "running"

    def _check_tasks(self) -> None:
        """Refuse rows of unknown tasks now, not when their turn comes."""
        method = self.adapter.method
        checks = (
            ("training", self.job.train, method.check_training_task),
            ("validation", self.job.validation, method.check_task),
        )
        for what, rows, check in checks:
            for task in dict.fromkeys(row.task for row in rows):
                try:
                    check(task)
                except ValueError as error:
                    raise ValueError(
                        f"job {self.job.name!r}, {what} rows of task {task!r}: {error}"
                    ) from None

    # --- One step -------------------------------------------------------------------------------

    def step(self) -> StepEvent | None:
        """Train one step; None if it failed: the job then has the weights of the step before."""
        start = time.perf_counter()
        sums, tokens = self.accumulate(self.begin_step())
        return self.finish_step(sums, tokens, time.perf_counter() - start)

    def begin_step(self) -> list[list[Example]]:
        """The examples of every micro-batch of the next step."""
        self.handle.use(self.job.name)
        self._edit(self.control.begin)
        return [[self.job.train[i] for i in part] for part in self.next_micro_batches()]

    def finish_step(self, sums: Tensor, tokens: int, seconds: float) -> StepEvent | None:
        """Use the gradients that lie at the parameters. sums: [loss, auxiliary loss, figures]; seconds: they took."""
        start = time.perf_counter()
        state, training = self.state, self.job.training
        factor = lr_factor(state.step, self.num_steps, training.scheduler, training.warmup_ratio)
        lr = self.peak_lr * factor
        norm = clip(self.parameters, training.max_grad_norm)
        found = torch.cat([sums, norm.to(sums.dtype).reshape(1)]).tolist()
        loss, aux, *figures, grad_norm = found
        if not (math.isfinite(loss) and math.isfinite(aux) and math.isfinite(grad_norm)):
            self._fail(loss, aux, lr)
            return None
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += tokens
        state.window.append([loss, aux, *figures])
        self._edit(lambda: self.control.after_step(state.step))
        is_logged = state.step % training.log_every == 0 or state.step == self.num_steps
        if is_logged:
            self._log(lr, grad_norm)
        seconds += time.perf_counter() - start
        state.seconds += seconds
        self._recent.append((tokens, seconds))
        return StepEvent(
            job=self.job.name,
            step=state.step,
            num_steps=self.num_steps,
            loss=loss,
            aux=aux,
            lr=lr,
            grad_norm=grad_norm,
            tokens=state.tokens,
            tokens_per_second=sum(t for t, _ in self._recent) / sum(s for _, s in self._recent),
            is_logged=is_logged,
            figures=dict(zip(self.objective.figures, figures, strict=True)),
        )

    def accumulate(
        self, examples: Sequence[Sequence[Example]], mine: Container[int] | None = None
    ) -> tuple[Tensor, int]:
        """Gradients of one step: ([loss, auxiliary loss, figures] of the step, tokens it saw). mine: the numbers of the
        micro-batches to run, None for all."""
        total = sum(self.objective.weight(part) for part in examples)
        sums = self.no_sums()
        tokens = 0
        for number, part in enumerate(examples):
            if mine is not None and number not in mine:
                continue
            batch = self.objective.complete(self.collate(part), part)
            width = batch["input_ids"].shape[1]
            with (
                running_with(self.rng_of(number), self.device),
                fastest_attention(self.device, self.dtype, width),
            ):
                sums += self._backward(batch, total).to(sums.dtype)
            tokens += num_tokens(batch)
        return sums, tokens

    def rng_of(self, number: int) -> States:
        """The generators of micro-batch `number` of the next step: the job's own for the first. Further ones depend on
        none before them, so that they may run anywhere."""
        if number == 0:
            return self.rng
        text = f"{self.job.seed} {self.state.step} {number}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        return seeded_states(seed, self.device)

    def no_sums(self) -> Tensor:
        """[loss, auxiliary loss, figures] before anything was added."""
        return torch.zeros(2 + len(self.objective.figures), device=self.device)

    def _backward(self, batch: Mapping[str, Any], total: int) -> Tensor:
        """[loss, auxiliary loss, figures] of one micro-batch, each its share of a step that weighs `total`."""
        loss_sum, figures_K = self.objective.loss(batch, *self.forward.predictions(batch))
        loss = loss_sum / total
        share = self.objective.share(batch, total)
        aux = share * sum(self.handle.aux_losses(self.job.name).values(), loss.new_zeros(()))
        (loss + aux).backward()
        return means_of(loss.detach(), aux.detach(), figures_K / total)

    def next_micro_batches(self) -> list[list[int]]:
        """Indices of the examples of the next step."""
        size = self.job.training.gradient_accumulation_steps
        return self.plan[self.state.step * size : (self.state.step + 1) * size]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The tensors of one micro-batch."""
        job = self.job
        return collate(examples, job.pad_token_id, packing=job.packing, max_len=job.sequence_len)

    def _fail(self, loss: float, aux: float, lr: float) -> None:
        what = "gradient" if math.isfinite(loss + aux) else "loss"
        self.fail(
            f"the {what} of step {self.state.step + 1} is not finite (loss {loss:g}, auxiliary {aux:g}, learning rate "
            f"{lr:.2g})",
            "Try a lower learning_rate or a longer warm-up",
        )

    def fail(self, what: str, hint: str) -> None:
        """Stop the job with the weights of its last whole step."""
        self.stop_failed(f"{what}; the weights of step {self.state.step} are kept. {hint}")

    def stop_failed(self, reason: str) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.state.status, self.state.reason = "failed", reason

    def why_hopeless(self, loss: float) -> str:
        """Why a job that asked for it should stop after its last step, or ""."""
        config, state = self.job.training.stop, self.state
        if config is None:
            return ""
        rule = Stopping(config, self.num_steps, state.stopping)
        state.stopping = rule.state
        return rule.after_step(state.step, loss)

    def _log(self, lr: float, grad_norm: float) -> None:
        """A history row: means over the steps since the last one. No times: a resumed run must write the same rows."""
        state = self.state
        columns = zip(*state.window, strict=True)
        loss, aux, *figures = (sum(column) / len(state.window) for column in columns)
        row = {
            "step": state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
        }
        if any(entry[1] for entry in state.window):
            row["aux"] = aux
        row |= zip(self.objective.figures, figures, strict=True)
        state.history.append(row)
        state.window = []

    # --- The controller -------------------------------------------------------------------------

    def _schedule(self) -> Schedule:
        training = self.job.training
        batches = math.ceil(self.job.num_units / training.micro_batch_size)
        per_epoch = batches / training.gradient_accumulation_steps
        return Schedule(self.num_steps, per_epoch, self.peak_lr)

    def _edit(self, act: Callable[[], list[dict[str, Any]]]) -> None:
        if self.control.controller is None:
            return
        # A copy, so that a controller that draws from torch's generators draws the same in a resumed run.
        with running_with(dict(self.rng), self.device):
            edits = act()
        self.state.edits += edits
        self._new_edits += edits

    def take_edits(self) -> list[dict[str, Any]]:
        """The edits since this was last asked."""
        edits, self._new_edits = self._new_edits, []
        return edits

    def _samples(self, num: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
        """Examples for a controller to score with."""
        job = self.job
        if not job.validation:
            log.info(
                "job %s has no validation data: its ranks are scored on training data", job.name
            )
        pool = (job.validation or job.train)[:: job.rows_per_unit]  # of a pair the chosen answer
        chosen = [pool[i] for i in torch.randperm(len(pool), generator=generator)[:num].tolist()]
        size = job.training.micro_batch_size
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [collate(part, job.pad_token_id) for part in parts]

    # --- Validation -----------------------------------------------------------------------------

    def validate(self) -> tuple[float, bool]:
        """(mean loss over the validation data, whether it is the lowest so far)."""
        loss, *figures = self._validation_means()
        state = self.state
        if not state.history or state.history[-1]["step"] != state.step:
            state.history.append({"step": state.step})
        state.history[-1]["val_loss"] = loss
        for name, value in zip(self.objective.figures, figures, strict=True):
            state.history[-1][f"val_{name}"] = value
        is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_step, state.num_bad = loss, state.step, 0
            self.control.keep_ranks_as_best()
            self.best = {name: t.detach().cpu().clone() for name, t in self.weights().items()}
        else:
            state.num_bad += 1
        return loss, is_best

    @torch.no_grad()
    def _validation_means(self) -> list[float]:
        """[loss, figures...] over the validation data."""
        size, objective = self.job.training.micro_batch_size, self.objective
        self.handle.use(self.job.name)
        self.model.eval()
        total, count = [0.0] * (1 + len(objective.figures)), 0
        # A copy: how often a run validates must not change what it draws in training.
        with running_with(dict(self.rng), self.device):
            for rows in objective.batches(self.job.validation, size):
                batch = objective.complete(self.collate(rows), rows)
                loss, figures_K = objective.loss(batch, *self.forward.predictions(batch))
                found = [loss.item(), *figures_K.tolist()]
                total = [so_far + more for so_far, more in zip(total, found, strict=True)]
                count += objective.weight(rows)
        self.model.train()
        return [value / count for value in total]

    # --- What is written down -------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters and buffers of the adapter."""
        buffers: dict[str, Tensor] = dict(self.adapter.named_buffers())
        return {**self.parameters, **buffers}

    @torch.no_grad()
    def set_weights(self, saved: Mapping[str, Tensor]) -> None:
        own = self.weights()
        if own.keys() != saved.keys():
            raise ValueError(
                f"the saved state of {self.job.name!r} holds other tensors than this adapter: "
                f"{sorted(own.keys() ^ saved.keys())[:3]}"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.weights().values())

    def use_best(self) -> None:
        """Put the weights of the best validation back, if there was one."""
        if self.best is not None:
            self._note_undone_edits()
            self.control.resize_to_best()
            self.set_weights(self.best)

    def _note_undone_edits(self) -> None:
        """Edits made after the best validation do not last: the ledger must say so."""
        state = self.state
        last = max((int(row["step"]) for row in state.edits), default=0)
        if last <= state.best_step:
            return
        log.warning(
            "job %s keeps the weights of step %d, its best validation: what its method edited after that, up to step "
            "%d, is undone; leave out the validation to keep the last weights",
            self.job.name, state.best_step, last,
        )  # fmt: skip
        row: dict[str, Any] = {"step": state.step, "what": "restore", "site": ""}
        row["best_step"] = state.best_step
        if ranks := self.control.best_ranks_if_others():
            row["ranks"] = ranks
        state.edits.append(row)
        self._new_edits.append(row)

    def saved_state(self) -> dict[str, Any]:
        """How far the job is, as plain JSON values."""
        self.state.control = self.control.state()
        return self.state.to_dict()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything but `saved_state` that a resumed job needs."""
        groups = {
            "adapter": self.weights(),
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
            "rng": dict(self.rng),
            "control": self.control.tensors(),
        }
        if own := self.objective.tensors():
            groups["objective"] = own
        if self.best is not None:
            groups["best"] = self.best
        return groups

    def restore(self, state: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.state = JobState.from_dict(state)
        self.control.resize(self.state.control)
        self.set_weights(groups["adapter"])
        load_optimizer_tensors(self.optimizer, self.parameters, groups["optimizer"])
        self.rng = dict(groups["rng"])
        self.best = dict(groups["best"]) if "best" in groups else None
        self.control.restore(self.state.control, groups.get("control", {}))
        self.objective.restore(groups.get("objective", {}))
