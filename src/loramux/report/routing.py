"""Counts which modules or experts the prompts of each task are routed to.

Why counts instead of the gates themselves: a report compares tasks, and tasks differ in their number
of prompts. Everything here works on plain arrays; only `observe` runs a model.

Letters: N requests or tokens, L layers, C columns (modules or experts).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loramux.data.tasks import TaskRow
    from loramux.recipe import Template

Measure = Literal["selected", "weight"]
Unit = Literal["prompts", "tokens"]


@dataclass(frozen=True)
class Routing:
    """Per task a table [layers, columns], NaN where a layer has no such column.

    `measure` says what the tables hold: the share of prompts (or tokens) that select the column, or,
    for routers that always use everything, the mean weight. `entropy` [layers] lies between 0 (the
    router always decides alike and surely) and 1 (it does not decide).
    """

    columns: tuple[str, ...]
    layers: tuple[int, ...]
    tables: Mapping[str, NDArray[np.float64]]
    entropy: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, int]
    measure: Measure = "selected"
    unit: Unit = "prompts"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.tables)

    def share(self, task: str) -> NDArray[np.float64]:
        """Share of each column [columns] over all layers; sums to 1."""
        total = np.nansum(self.tables[task], axis=0)
        return np.asarray(total / max(float(total.sum()), 1e-12))

    def difference(self, task: str) -> NDArray[np.float64]:
        """This task's table minus the mean over all tasks: what is its own."""
        return np.asarray(self.tables[task] - np.mean(list(self.tables.values()), axis=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        return {
            "measure": self.measure,
            "unit": self.unit,
            "columns": list(self.columns),
            "layers": list(self.layers),
            "tasks": {
                task: {
                    "count": self.counts[task],
                    "table": _plain(self.tables[task]),
                    "entropy": _plain(self.entropy[task]),
                }
                for task in self.tables
            },
        }


@dataclass
class _Sums:
    """Sums of one task, layer by layer."""

    count: int = 0
    selected: dict[int, dict[str, float]] = field(default_factory=dict)
    weight: dict[int, dict[str, float]] = field(default_factory=dict)
    seen: dict[int, dict[str, int]] = field(default_factory=dict)
    entropy: dict[int, list[float]] = field(default_factory=dict)


class RoutingCounter:
    """Adds up gates batch by batch; `result` turns the sums into shares."""

    def __init__(self, unit: Unit = "prompts") -> None:
        self.unit = unit
        self._tasks: dict[str, _Sums] = {}

    def add(
        self,
        task: str,
        layer: int,
        columns: Sequence[str],
        gates: Any,
        probs: Any = None,
        valid: Any = None,
    ) -> None:
        """Count one router's decisions: `gates` [N, C], `probs` [N, C] before selection, `valid` [N].

        Routers that share a layer (one per site) are averaged over.
        """
        gates_NC = np.asarray(gates, dtype=np.float64)
        if gates_NC.ndim != 2 or gates_NC.shape[1] != len(columns):
            raise ValueError(
                f"gates must be [n, {len(columns)}] for the columns {list(columns)}, "
                f"got {list(gates_NC.shape)}"
            )
        probs_NC = gates_NC if probs is None else np.asarray(probs, dtype=np.float64)
        if valid is not None:
            keep = np.asarray(valid, dtype=bool)
            gates_NC, probs_NC = gates_NC[keep], probs_NC[keep]
        sums = self._tasks.setdefault(task, _Sums())
        for name in (sums.selected, sums.weight, sums.seen):
            name.setdefault(layer, {})
        for c, column in enumerate(columns):
            _add(sums.selected[layer], column, float((gates_NC[:, c] != 0).sum()))
            _add(sums.weight[layer], column, float(gates_NC[:, c].sum()))
            sums.seen[layer][column] = sums.seen[layer].get(column, 0) + len(gates_NC)
        sums.entropy.setdefault(layer, []).extend(normalised_entropy(probs_NC).tolist())

    def add_records(self, task: str, records: Iterable[Any]) -> None:
        """Count the route records of one forward pass (`handle.routing()`)."""
        for record in records:
            probs = None if record.probs is None else record.probs.detach().float().cpu().numpy()
            valid = None if record.valid is None else record.valid.cpu().numpy()
            gates = record.gates.detach().float().cpu().numpy()
            self.add(task, record.layer, record.columns, gates, probs, valid)

    def count(self, task: str, number: int) -> None:
        """Say that `number` more prompts (or tokens) of the task were routed."""
        self._tasks.setdefault(task, _Sums()).count += number

    def result(self) -> Routing:
        """The shares so far; raises if nothing was counted."""
        if not any(sums.seen for sums in self._tasks.values()):
            raise ValueError("no routing was recorded; does the adapter have a router?")
        layers = sorted({layer for sums in self._tasks.values() for layer in sums.seen})
        columns = list(
            dict.fromkeys(
                column
                for sums in self._tasks.values()
                for layer in sums.seen.values()
                for column in layer
            )
        )
        selected = {t: _table(s.selected, s.seen, layers, columns) for t, s in self._tasks.items()}
        weight = {t: _table(s.weight, s.seen, layers, columns) for t, s in self._tasks.items()}
        # A router that selects everything everywhere is told apart by its weights.
        dense = all(bool(np.all(np.nan_to_num(t, nan=1.0) == 1.0)) for t in selected.values())
        entropy = {
            task: np.array([np.mean(sums.entropy.get(layer, [np.nan])) for layer in layers])
            for task, sums in self._tasks.items()
        }
        return Routing(
            columns=tuple(columns),
            layers=tuple(layers),
            tables=weight if dense else selected,
            entropy=entropy,
            counts={task: sums.count for task, sums in self._tasks.items()},
            measure="weight" if dense else "selected",
            unit=self.unit,
        )


def normalised_entropy(probs_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of each row over log C, in [0, 1]; rows are normalised first."""
    total = probs_NC.sum(1, keepdims=True)
    share = probs_NC / np.where(total > 0, total, 1.0)
    terms = np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0)
    return np.asarray(-terms.sum(1) / np.log(max(probs_NC.shape[1], 2)))


def _add(sums: dict[str, float], key: str, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value


def _table(
    sums: Mapping[int, Mapping[str, float]],
    seen: Mapping[int, Mapping[str, int]],
    layers: Sequence[int],
    columns: Sequence[str],
) -> NDArray[np.float64]:
    table = np.full((len(layers), len(columns)), np.nan)
    for i, layer in enumerate(layers):
        for j, column in enumerate(columns):
            if number := seen.get(layer, {}).get(column, 0):
                table[i, j] = sums[layer][column] / number
    return table


def _plain(values: NDArray[np.float64]) -> Any:
    """Nested lists with four digits, None for NaN."""
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if np.isnan(v) else round(float(v), 4) for v in values]


def observe(
    model: Any,
    tokenizer: Any,
    rows_by_task: Mapping[str, Sequence[TaskRow]],
    *,
    template: Template = "task",
    rows: int = 64,
    batch_size: int = 16,
) -> Routing:
    """Route the first `rows` questions of each task through an attached model and count.

    Only the questions are run, no answers: that is all a prompt router ever reads.
    """
    from loramux.core.attach import handle_of
    from loramux.eval.encode import encode_question

    handle = handle_of(model)
    if handle is None:
        raise ValueError("the model has no adapter attached, so there is no routing to observe")
    if not any(rows_by_task.values()):
        raise ValueError("no questions were given; pass at least one task with rows")
    counter: RoutingCounter | None = None
    for task, task_rows in rows_by_task.items():
        chosen = task_rows[:rows]
        prompts = [encode_question(row, tokenizer, template) for row in chosen]
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            with handle.batch(tasks=[r.task for r in task_rows[start : start + len(part)]]):
                _run_prompts(model, part, [row.task for row in chosen[start : start + batch_size]])
            records = list(handle.routing())
            by_token = any(record.when == "token" for record in records)
            if counter is None:
                counter = RoutingCounter("tokens" if by_token else "prompts")
            counter.add_records(task, records)
            counter.count(task, sum(map(len, part)) if by_token else len(part))
    assert counter is not None
    return counter.result()


def _run_prompts(model: Any, prompts: Sequence[Sequence[int]], tasks: Sequence[str | None]) -> None:
    """One forward pass over right-padded prompts, all of it prompt; nothing is kept but its routing."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=model.device)
    seen = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(list(prompt))
        seen[i, : len(prompt)] = 1
    # Not inference mode: in it, token routers skip their records.
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=seen,
            use_cache=False,
            logits_to_keep=1,
            tasks=list(tasks),
        )
