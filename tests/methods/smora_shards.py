"""A SMoRA trained by several processes of one machine, each with its part of the batch."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing

from methods.smora_case import BATCH, attached, biases

SECONDS = 120.0


def trained(rank: int, world: int, update_every: str) -> dict[str, Tensor]:
    """Biases after two steps that leave all parameters as they are."""
    model, handle, _, _ = attached(bias_step=0.1, update_every=update_every)
    model.train()
    part: dict[str, Any] = {name: tensor[rank::world] for name, tensor in BATCH.items()}
    optimizer = torch.optim.SGD(handle.trainable_parameters().values(), lr=0.0)
    for _ in range(2):
        model(**part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(**part)
    return biases(handle)


def in_processes(world: int, folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """What every process ends with, by `update_every`."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_work, args=(rank, world, folder)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert codes == [0] * world, f"the processes ended with {codes}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world
    )
    ends = {every: trained(rank, world, every) for every in ("step", "forward")}
    torch.save(ends, folder / f"{rank}.pt")
    distributed.destroy_process_group()
