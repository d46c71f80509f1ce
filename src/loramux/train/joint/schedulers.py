"""Schedulers by the names that a recipe uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loramux.recipe import JointConfig
from loramux.train.joint.budget import TokenBudget
from loramux.train.joint.schedule import Adaptive, ByPriority, Fifo, MinPad, RoundRobin, Scheduler

MAKERS: Mapping[str, Callable[[JointConfig], Scheduler]] = {
    "round_robin": lambda config: RoundRobin(config.round_tokens),
    "fifo": lambda config: Fifo(config.concurrency),
    "priority": lambda config: ByPriority(config.concurrency),
    "minpad": lambda config: MinPad(config.concurrency),
    "adaptive": lambda config: Adaptive(config.concurrency, config.q),
    "budget": lambda config: TokenBudget(
        config.objective, config.round_tokens, config.priorities, config.patience
    ),
}


def make_scheduler(config: JointConfig) -> Scheduler:
    """The scheduler that `joint.scheduler` names, with the keys it understands."""
    return MAKERS[config.scheduler](config)
