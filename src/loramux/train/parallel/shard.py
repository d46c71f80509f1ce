"""The frozen base in pieces: every process holds its share of the decoder layers' weights (FSDP2).

A layer's weights are gathered when it runs, forward and backward, and dropped after. Adapters, optimizers, embeddings
and the head stay whole in every process. Gathering is done by all processes at once, so all must make as many model
calls: who has fewer micro-batches runs one of its own once more and throws away what comes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from loramux.core.sites import decoder_layers
from loramux.data import Example
from loramux.errors import RecipeError
from loramux.persist.base import keep_identity
from loramux.train.parallel.counts import counts_tokens
from loramux.train.parallel.group import Group, ParallelError

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.train.joint.forward import JointForward, Outcome, Part
    from loramux.train.joint.work import StepWork
    from loramux.train.runner import JobRunner


Call = TypeVar("Call")


def shard_base(model: nn.Module, handle: Handle, group: Group) -> None:
    """Lay the weights of the decoder layers out over the processes; they stay so."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # What is noted beside a saved adapter is read from the weights, by the first process alone.
    keep_identity(model, handle.sites)
    mesh = init_device_mesh(next(model.parameters()).device.type, (group.size,))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def check_shardable(runner: JobRunner) -> None:
    """Refuse jobs whose model calls cannot be repeated for nothing, or counted beforehand."""
    name, routers = runner.job.name, runner.adapter.routers.values()
    if counts_tokens(runner) or any(router.reads == "hidden" for router in routers):
        raise RecipeError(
            f"job {name!r}: {runner.adapter.method.name} cannot be trained over a base in pieces (its routers count "
            "what they see, or run the base first); leave out --shard-base"
        )
    if runner.job.objective is not None:
        raise RecipeError(
            f"job {name!r}: preferences need calls of a reference, which processes do not make alike; leave out "
            "--shard-base"
        )


def repeat_for_others(runner: JobRunner, examples: Sequence[Sequence[Example]], times: int) -> None:
    """Take part in the calls of others; gradients and generators are as before."""
    grads = [parameter.grad for parameter in runner.parameters.values()]
    rng = dict(runner.rng)
    for parameter in runner.parameters.values():
        parameter.grad = None
    for _ in range(times):
        runner.accumulate(examples, {0})
    runner.rng.update(rng)
    for parameter, grad in zip(runner.parameters.values(), grads, strict=True):
        parameter.grad = grad


class EvenCalls:
    """The calls of a joint run over such a base: as many in every process, and one that fails ends the run."""

    def __init__(self, joint: JointForward, group: Group):
        self.joint = joint
        self.group = group
        self.device, self.dtype = joint.device, joint.dtype
        self.missing = 0  # calls that another process makes and this one does not

    def __call__(self, parts: Sequence[Part]) -> list[Outcome]:
        with self._all_or_none():
            return self.joint(parts)

    def alone(self, part: Part) -> Outcome:
        with self._all_or_none():
            return self.joint.alone(part)

    def announced(self, calls: Iterable[Call]) -> list[Call]:
        """The calls that this process is about to make; before the first, all know of the others'."""
        own = list(calls)
        self.missing = max(self.group.exchange(len(own))) - len(own)
        return own

    def keep_up(self, works: Sequence[StepWork]) -> None:
        """Take part in the calls that others have left."""
        with self._all_or_none():
            for _ in range(self.missing):
                part = next(work for work in works if work.is_alive).part(0)
                self.joint.alone(replace(part, rng=dict(part.rng)))

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        try:
            yield
        except ParallelError:
            raise
        except Exception as error:
            raise ParallelError(
                f"a call failed in process {self.group.rank}, and over a base in pieces nobody can go on without it "
                f"({type(error).__name__}: {error})"
            ) from error


def calls_of(owners: Sequence[int], rank: int) -> int:
    """How many more calls the busiest process makes than this one."""
    counts = [list(owners).count(each) for each in set(owners)]
    return max(counts, default=0) - list(owners).count(rank)
