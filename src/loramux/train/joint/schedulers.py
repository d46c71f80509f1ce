"""Schedulers by the names that a recipe uses."""

from __future__ import annotations

from collections.abc import Callable

from loramux.errors import RecipeError, suggest
from loramux.recipe import JointConfig
from loramux.train.joint.budget import TokenBudget
from loramux.train.joint.schedule import Adaptive, ByPriority, Fifo, MinPad, RoundRobin, Scheduler


def make_scheduler(config: JointConfig) -> Scheduler:
    """The scheduler that `joint.scheduler` names, with the keys it understands."""
    makers = _makers(config)
    if config.scheduler not in makers:
        raise RecipeError(
            f"joint.scheduler: {config.scheduler!r} is unknown; {suggest(config.scheduler, makers)}"
        )
    return makers[config.scheduler]()


def scheduler_names() -> list[str]:
    return list(_makers(JointConfig()))


def _makers(config: JointConfig) -> dict[str, Callable[[], Scheduler]]:
    slots = config.concurrency
    return {
        "round_robin": lambda: RoundRobin(config.round_tokens),
        "fifo": lambda: Fifo(slots),
        "priority": lambda: ByPriority(slots),
        "minpad": lambda: MinPad(slots),
        "adaptive": lambda: Adaptive(slots, config.q),
        "budget": lambda: TokenBudget(
            config.objective,
            config.round_tokens,
            config.priorities,
            config.patience,
        ),
    }
