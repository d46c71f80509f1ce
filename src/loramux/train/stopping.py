"""Stops a job that has no hope: one that diverges, one that has converged, one whose last steps are not worth it.

After a warm-up the training loss is smoothed. Diverged: twice its lowest value for twenty steps in a row. Converged:
hardly better than some evaluations ago. Predicted: a curve a + b t^-c through the smoothed losses says what the rest
of the steps would still gain (ASPEN, arXiv 2312.02515v1, predicts early stops from loss curves and does not say how;
the rules and numbers here are ours). All of it is a function of the losses, so a resumed run decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loramux.recipe import StopConfig

SMOOTHING = 0.9
DIVERGED_FACTOR, DIVERGED_STEPS = 2.0, 20
WARMUP_SHARE = 0.1
POINTS = 8  # evaluations that a prediction needs
POWERS = tuple(0.05 * 1.25**i for i in range(20))  # tried for c: 0.05 to 3.5


class Stopping:
    """What is kept of the losses of one job. `state`: plain JSON values, to go on from."""

    def __init__(self, config: StopConfig, num_steps: int, state: dict[str, Any] | None = None):
        self.config = config
        self.num_steps = num_steps
        self.state: dict[str, Any] = state or {
            "mean": None,
            "low": None,
            "high_for": 0,
            "points": [],
        }

    def after_step(self, step: int, loss: float) -> str:
        """Why the job should stop after this step, or ""."""
        state = self.state
        before = state["mean"]
        mean = loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss
        state["mean"] = mean
        state["low"] = mean if state["low"] is None else min(state["low"], mean)
        if step < max(self.config.warmup, math.ceil(WARMUP_SHARE * self.num_steps)):
            return ""
        return self._diverged(mean) or self._evaluated(step, mean)

    def _diverged(self, mean: float) -> str:
        state = self.state
        state["high_for"] = state["high_for"] + 1 if mean > DIVERGED_FACTOR * state["low"] else 0
        if not self.config.diverged or state["high_for"] < DIVERGED_STEPS:
            return ""
        return (
            f"diverged: the smoothed loss {mean:.4g} has been over {DIVERGED_FACTOR:g} times its lowest, "
            f"{state['low']:.4g}, for {DIVERGED_STEPS} steps"
        )

    def _evaluated(self, step: int, mean: float) -> str:
        if step % self.config.every:
            return ""
        points: list[list[float]] = self.state["points"]
        points.append([step, mean])
        return self._converged(points) or self._predicted(points)

    def _converged(self, points: Sequence[Sequence[float]]) -> str:
        patience, least = self.config.patience, self.config.min_gain
        if not self.config.converged or len(points) <= patience:
            return ""
        before, now = points[-1 - patience][1], points[-1][1]
        if before <= 0 or (before - now) / before >= least:
            return ""
        return (
            f"converged: the smoothed loss went from {before:.4g} to {now:.4g} in {patience} evaluations, less than "
            f"{least:.2%}"
        )

    def _predicted(self, points: Sequence[Sequence[float]]) -> str:
        if self.config.predicted_gain is None or len(points) < POINTS:
            return ""
        a, b, c = fit_power_law([p[0] for p in points], [p[1] for p in points])
        now, end = points[-1][1], a + b * self.num_steps**-c
        if now <= 0 or (now - end) / now >= self.config.predicted_gain:
            return ""
        return (
            f"not worth its last steps: the loss curve says {end:.4g} after step {self.num_steps}, it is {now:.4g} "
            f"now, and less than {self.config.predicted_gain:.2%} would be gained"
        )


def fit_power_law(steps: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, c) of a + b t^-c with the least squared error, b not negative; c from a grid."""
    best = (math.inf, (values[-1], 0.0, 1.0))
    count = len(steps)
    for c in POWERS:
        x = [t**-c for t in steps]
        mean_x, mean_y = sum(x) / count, sum(values) / count
        spread = sum((v - mean_x) ** 2 for v in x)
        if spread == 0:
            continue
        b = sum((u - mean_x) * (v - mean_y) for u, v in zip(x, values, strict=True)) / spread
        b = max(b, 0.0)
        a = mean_y - b * mean_x
        error = sum((a + b * u - v) ** 2 for u, v in zip(x, values, strict=True))
        if error < best[0]:
            best = (error, (a, b, c))
    return best[1]
