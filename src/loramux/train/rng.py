"""Each job owns the state of torch's generators while it runs.

Why swapped in and out: dropout and router noise draw from torch's global generators. With a state per job, what one job
draws never depends on its neighbours, and a checkpoint holds it as one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

States = dict[str, Tensor]


def seeded_states(seed: int, device: torch.device) -> States:
    """The states right after `torch.manual_seed(seed)`; the global ones are left as they are."""
    before = current_states(device)
    torch.manual_seed(seed)
    states = current_states(device)
    set_states(before, device)
    return states


@contextmanager
def running_with(states: States, device: torch.device) -> Iterator[None]:
    """Everything drawn inside comes from `states`, which is advanced; the caller's generators are not."""
    before = current_states(device)
    set_states(states, device)
    try:
        yield
    finally:
        states.update(current_states(device))
        set_states(before, device)


def current_states(device: torch.device) -> States:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_states(states: States, device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
