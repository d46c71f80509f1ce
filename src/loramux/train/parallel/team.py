"""How the processes of a run share the work: micro-batches are dealt out whole, what comes of them is added up.

Why whole: a micro-batch keeps its dropout masks, its padding and its auxiliary losses, whose statistics are those of
the micro-batch, so a job trains as in one process up to the order of a sum. Only rows that know nothing of each other
(plain LoRA without dropout) are cut further, where there are fewer micro-batches than processes. Every process holds
all adapters, optimizers and random numbers, and takes the same optimizer step; gradients of adapters are the only
large message.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.data import Example
from loramux.train.events import StepEvent
from loramux.train.parallel import shard
from loramux.train.parallel.counts import counters, counts_tokens
from loramux.train.parallel.group import Group, ParallelError

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner
    from loramux.train.trainer import Trainer

PLAIN = "lora"  # the method whose rows may be cut apart
DROPOUTS = ("attention_dropout", "attn_pdrop", "resid_pdrop", "hidden_dropout", "embd_pdrop")
Parts = list[list[Example]]


@dataclass(eq=False)
class Share:
    """What this process does of one job's step. owners: who runs which micro-batch; mine: the numbers of
    those it runs; before: the job's generators at the start; the rest is what came of it."""

    runner: JobRunner
    examples: Parts
    owners: list[int]
    mine: frozenset[int]
    sums: Tensor
    before: dict[str, Tensor]
    tokens: int = 0
    seconds: float = 0.0

    @property
    def owner(self) -> int:
        """Who runs the first one."""
        return self.owners[0]


class Team:
    """The group at work for one trainer."""

    def __init__(self, group: Group):
        self.group = group
        self.wants_stop = False  # asked of this process
        self.is_stopping = False  # asked of any, as all of them know

    def take_in(self, runner: JobRunner) -> None:
        """A job of this trainer: what its routers count is shared with its gradients, not by themselves."""
        for router in runner.adapter.routers.values():
            router.is_summed = False
        if self.group.shards_base:
            shard.check_shardable(runner)

    def step(self, number: int, runner: JobRunner) -> StepEvent | None:
        """`JobRunner.step` of all processes together."""
        start = time.perf_counter()
        (share,) = self.divide([(runner, runner.begin_step())])
        share.sums, share.tokens = runner.accumulate(share.examples, share.mine)
        if self.group.shards_base:
            shard.repeat_for_others(
                runner, share.examples, shard.calls_of(share.owners, self.group.rank)
            )
        share.seconds = time.perf_counter() - start
        self.merge(number, [share])
        if not runner.is_running:
            return None
        return runner.finish_step(share.sums, share.tokens, share.seconds)

    # --- Who does what ----------------------------------------------------------------------------

    def divide(self, steps: Sequence[tuple[JobRunner, Parts]]) -> list[Share]:
        """What this process does of these steps; all processes know who does what."""
        cut = self.cut({runner.job.name: (runner, parts) for runner, parts in steps})
        owners = self.owners(
            {runner.job.name: (runner, cut[runner.job.name]) for runner, _ in steps}
        )
        shares = []
        for runner, _ in steps:
            ranks = owners[runner.job.name]
            mine = frozenset(i for i, rank in enumerate(ranks) if rank == self.group.rank)
            parts, before = cut[runner.job.name], dict(runner.rng)
            shares.append(Share(runner, parts, ranks, mine, runner.no_sums(), before))
        return shares

    def owners(self, steps: Mapping[str, tuple[JobRunner, Parts]]) -> dict[str, list[int]]:
        """The process of every micro-batch: the largest first, each to who has least so far."""
        units: list[tuple[int, str, list[int]]] = []
        for name, (runner, parts) in steps.items():
            costs = [_cost(part) for part in parts]
            if counts_tokens(
                runner
            ):  # what it sees decides what it does next: in order, in one process
                units.append((sum(costs), name, list(range(len(parts)))))
            else:
                units += [(cost, name, [i]) for i, cost in enumerate(costs)]
        loads = [0] * self.group.size
        owners = {name: [0] * len(parts) for name, (_, parts) in steps.items()}
        for cost, name, numbers in sorted(units, key=lambda unit: -unit[0]):
            rank = loads.index(min(loads))
            loads[rank] += cost
            for number in numbers:
                owners[name][number] = rank
        return owners

    def cut(self, steps: Mapping[str, tuple[JobRunner, Parts]]) -> dict[str, Parts]:
        """The micro-batches of every job, cut into rows where that leaves fewer processes idle."""
        units = sum(len(parts) for _, parts in steps.values())
        pieces = math.ceil(self.group.size / max(1, units))
        return {
            name: [part[i::pieces] for part in parts for i in range(min(pieces, len(part)))]
            if pieces > 1 and rows_are_apart(runner)
            else parts
            for name, (runner, parts) in steps.items()
        }

    def begin(self, trainer: Trainer) -> None:
        """Before the first round: all processes must have read the same."""
        number, runners = trainer.round, trainer.runners
        self._check_same(
            [
                {"number": heard["number"], "jobs": heard["jobs"]}
                for heard in self.group.exchange(
                    {
                        "number": number,
                        "jobs": {r.job.name: {"step": r.state.step} for r in runners},
                    }
                )
            ]
        )
        self.same_weights(runners)
        if self.group.shards_base:
            shard.shard_base(trainer.model, trainer.handle, self.group)

    # --- What came of it --------------------------------------------------------------------------

    def merge(self, number: int, shares: Sequence[Share]) -> None:
        """Gradients, losses, generators and counts of all processes, in every one of them; who failed has failed in
        all."""
        told = {
            "number": number,
            "stop": self.wants_stop,
            "jobs": {share.runner.job.name: _told(share) for share in shares},
        }
        heard = self.group.exchange(told)
        self._check_same(heard)
        self.is_stopping = any(one["stop"] for one in heard)
        alive = []
        for share in shares:
            rows = [one["jobs"][share.runner.job.name] for one in heard]
            reason = next((row["failed"] for row in rows if row["failed"]), "")
            if reason and share.runner.is_running:
                share.runner.stop_failed(reason)
            if not reason:
                alive.append((share, rows))
        tensors: list[Tensor] = []
        for share, rows in alive:
            share.tokens = sum(row["tokens"] for row in rows)
            share.seconds = max(row["seconds"] for row in rows)
            tensors += self._tensors(share, rows)
        if tensors:
            self.group.add_up(tensors)

    def _check_same(self, heard: Sequence[Mapping[str, Any]]) -> None:
        first = heard[0]
        for rank, other in enumerate(heard):
            steps = [
                {name: row["step"] for name, row in one["jobs"].items()} for one in (first, other)
            ]
            if other["number"] != first["number"] or steps[0] != steps[1]:
                raise ParallelError(
                    f"process {rank} is at round {other['number']} with the steps {steps[1]}, the first process at "
                    f"round {first['number']} with {steps[0]}; they read different folders or files: give all "
                    "processes the same ones"
                )

    def _tensors(self, share: Share, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """What has to be added up of a job; what others have and this process lacks is made, as zeros."""
        runner = share.runner
        found = [share.sums]
        for i, parameter in enumerate(runner.parameters.values()):
            if any(row["grads"][i] == "1" for row in rows):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
        is_owner = share.owner == self.group.rank
        if any(row["drew"] for row in rows):
            for name, state in runner.rng.items():
                runner.rng[name] = state.clone() if is_owner else torch.zeros_like(state)
            found += runner.rng.values()
        if counts_tokens(runner):
            found += self._counted(share, rows)
        return found

    def _counted(self, share: Share, rows: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Buffers of the adapter, and what its routers have counted, of the process that saw the tokens."""
        is_owner = share.owner == self.group.rank
        found: list[Tensor] = []
        for buffer in share.runner.adapter.buffers():
            if not is_owner:
                buffer.zero_()
            found.append(buffer)
        shapes = rows[share.owner]["counted"]
        for (router, key), shape in zip(counters(share.runner), shapes, strict=True):
            if shape is None:
                setattr(router, key, None)
                continue
            if not is_owner:
                setattr(
                    router,
                    key,
                    torch.zeros(shape, dtype=torch.long, device=share.runner.device),
                )
            found.append(getattr(router, key))
        return found

    def same_weights(self, runners: Sequence[JobRunner]) -> None:
        """Raise unless all processes hold the same adapters, bit for bit."""
        own = {runner.job.name: weights_digest(runner) for runner in runners}
        for rank, other in enumerate(self.group.exchange(own)):
            wrong = [name for name in own if other.get(name) != own[name]]
            if wrong or len(other) != len(own):
                raise ParallelError(
                    f"processes {self.group.rank} and {rank} hold other weights of {wrong or list(own)}: they do not "
                    "run on like machines, or read different files. Start again from the last state, on like machines"
                )


def _told(share: Share) -> dict[str, Any]:
    runner = share.runner
    drew = any(not torch.equal(state, share.before[name]) for name, state in runner.rng.items())
    return {
        "step": runner.state.step,
        "failed": "" if runner.is_running else runner.state.reason,
        "tokens": share.tokens,
        "seconds": share.seconds,
        "grads": "".join("01"[p.grad is not None] for p in runner.parameters.values()),
        "drew": drew,
        "counted": [
            None if (value := getattr(router, key)) is None else list(value.shape)
            for router, key in counters(runner)
        ],
    }


def _cost(part: Sequence[Example]) -> int:
    return len(part) * max(len(example) for example in part)


def rows_are_apart(runner: JobRunner) -> bool:
    """Whether a row's loss is the same whatever rows are beside it, and nothing is drawn."""
    method = runner.adapter.method
    config = getattr(runner.model, "config", None)
    is_plain = method.name == PLAIN and not runner.adapter.routers
    own = getattr(method.config, "lora_dropout", 0.0)
    base = [getattr(config, name, 0.0) for name in DROPOUTS]
    return is_plain and not own and not any(base) and runner.job.objective is None


def weights_digest(runner: JobRunner) -> str:
    """SHA-256 of what training changes."""
    state = hashlib.sha256()
    for name, tensor in runner.weights().items():
        state.update(name.encode())
        state.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return state.hexdigest()
