"""A controller that does all that controllers may: it moves ranks between sites, copies from a snapshot, draws."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loramux.core.controller import Controller, Edit, Moment
from loramux.core.edits import Snapshot


class Moving(Controller):
    """After every second step a random site loses its weakest rank and another gets a fresh one.

    After every fourth, row 0 of every site becomes a copy of its last row as it was a step before.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.ledger: list[list[Any]] = []

    def before_training(self, moment: Moment) -> Sequence[Edit]:
        assert moment.step == 0
        assert moment.samples is not None
        batch = moment.samples(3, moment.generator)[0]
        moment.handle.model.eval()
        with torch.no_grad():
            torch.rand(1)  # the job's own numbers must not notice
            logits = moment.handle.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        return [{"step": 0, "what": "probe", "site": "", "norm": float(logits.norm())}]

    def after_step(self, moment: Moment) -> Sequence[Edit]:
        if moment.step % 4 == 3:
            self.snapshot = moment.edit.snapshot()
        if moment.step % 4 == 0 and self.snapshot is not None:
            return self._copy(moment, self.snapshot)
        return self._move(moment) if moment.step % 4 == 2 else ()

    def _copy(self, moment: Moment, snapshot: Snapshot) -> Sequence[Edit]:
        for path, rows in moment.adapter.rows.items():
            rank = rows.spans.rank[0]
            if rank:
                moment.edit.gather(path, 0, [rank - 1, *range(1, rank)], snapshot)
        self.snapshot = None
        return [{"step": moment.step, "what": "copy", "site": ""}]

    def _move(self, moment: Moment) -> Sequence[Edit]:
        rows = moment.adapter.rows
        able = [path for path in rows if rows[path].spans.rank[0]]
        loser, winner = (
            able[int(torch.randint(len(able), (), generator=moment.generator))] for _ in range(2)
        )
        weakest = int(rows[loser].b.detach().norm(dim=1).argmin())
        rank = rows[loser].spans.rank[0]
        moment.edit.gather(loser, 0, [i for i in range(rank) if i != weakest])
        moment.edit.gather(winner, 0, [*range(rows[winner].spans.rank[0]), -1])
        self.ledger.append([moment.step, loser, winner])
        return [{"step": moment.step, "what": "move", "site": loser, "to": winner}]

    def state(self) -> dict[str, Any]:
        return {"ledger": self.ledger}

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.snapshot is None else dict(self.snapshot.tensors)

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.ledger = list(state["ledger"])
        self.snapshot = Snapshot(tensors) if tensors else None
