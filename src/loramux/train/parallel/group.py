"""The processes of a run: who there is, what they tell each other, and what is added up over them.

Started by torchrun or accelerate, which set RANK, WORLD_SIZE and where to meet; without them nothing here happens.
Messages are JSON, so nothing that arrives can run. A process that ends or does not answer in time is one clear error
in all others: a sum over fewer processes would train something else.

Letters: P processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loramux.errors import LoramuxError

T = TypeVar("T")
RANK, WORLD_SIZE, LOCAL_RANK = "RANK", "WORLD_SIZE", "LOCAL_RANK"
SECONDS = "LORAMUX_PARALLEL_SECONDS"  # how long a process may let the others wait
DEFAULT_SECONDS = 900.0  # ours: more than a state or a validation takes


class ParallelError(LoramuxError):
    """The processes of a run cannot go on together."""


class Group:
    """All processes of one run, this one being number `rank` of `size`. shards_base: each holds a part of the base."""

    def __init__(
        self, rank: int, size: int, seconds: float = DEFAULT_SECONDS, shards_base: bool = False
    ):
        self.rank = rank
        self.size = size
        self.seconds = seconds
        self.shards_base = shards_base

    @property
    def is_first(self) -> bool:
        """The first process writes files, shows progress and hears commands."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What every process gave, by rank; plain JSON values."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self._answering():
            sizes_P = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
            dist.all_gather(sizes_P, torch.tensor([data.numel()]))
            longest = max(int(size) for size in sizes_P)
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: data.numel()] = data
            found_P = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(found_P, padded)
        return [
            json.loads(bytes(found[: int(size)].tolist()))
            for found, size in zip(found_P, sizes_P, strict=True)
        ]

    def of_first(self, value: T) -> T:
        """What the first process gave, in all of them."""
        found: T = self.exchange(value if self.is_first else None)[0]
        return found

    def first(self, act: Callable[[], Any]) -> Any:
        """What `act` gives in the first process, where alone it runs; if it raises, so do all."""
        problem: Exception | None = None
        told: dict[str, Any] = {}
        if self.is_first:
            try:
                told = {"value": act()}
            except Exception as error:
                problem, told = error, {"error": str(error)}
        heard = self.of_first(told)
        if problem is not None:
            raise problem
        if "error" in heard:
            raise ParallelError(f"the first process of the run stopped: {heard['error']}")
        return heard["value"]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes; one message per dtype and device."""
        kinds = list(dict.fromkeys((t.dtype, t.device) for t in tensors))
        for kind in kinds:
            some = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.detach().reshape(-1) for t in some])
            with self._answering():
                dist.all_reduce(flat)
            parts = torch.split(flat, [t.numel() for t in some])
            for tensor, own in zip(some, parts, strict=True):
                tensor.detach().copy_(own.view_as(tensor))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ParallelError(
                f"another of the {self.size} processes has ended, or let process {self.rank} wait for more than "
                f"{self.seconds:g} s ({SECONDS}): {reason}. What it said is in its own log; the same command goes on "
                "from the last state"
            ) from error


def size_of_launch() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get(WORLD_SIZE, "1"))


def is_first_process() -> bool:
    """Whether this process is the one that writes and shows."""
    return size_of_launch() == 1 or os.environ.get(RANK, "0") == "0"


def local_device() -> torch.device:
    """Where this process computes: its own GPU if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get(LOCAL_RANK, "0")) % torch.cuda.device_count())


@contextmanager
def connected(shards_base: bool = False) -> Iterator[Group | None]:
    """The group that a launcher has started this process in; None where there is only this one."""
    size = size_of_launch()
    if size == 1 or dist.is_initialized():  # a run inside a run is that process's own
        if shards_base and size == 1:
            raise ParallelError(
                "the base is laid out over processes, and there is only this one; start several with torchrun, or "
                "leave out --shard-base"
            )
        yield None
        return
    seconds = float(os.environ.get(SECONDS, DEFAULT_SECONDS))
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Messages are on the CPU; gradients are where the model is.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except (ValueError, RuntimeError) as error:
        raise ParallelError(
            f"{WORLD_SIZE} says that this is one of {size} processes, but they do not meet "
            f"({' '.join(str(error).split())[:300]}); start them with torchrun or accelerate launch, or unset "
            f"{WORLD_SIZE}"
        ) from None
    try:
        yield Group(int(os.environ[RANK]), size, seconds, shards_base)
    finally:
        dist.destroy_process_group()
