"""MoLE gates with the oracle's numbers: what the tests of the method share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.types import RouteRecord
from loramux.methods.mole import MoLEConfig
from methods.bridge import build_double, close, copy_mole, write_experts
from oracles import mole, mole_model
from oracles.random_params import mole_params
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
PROMPT = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
REAL = MASK.bool()
NAMES = ("red", "green", "blue", "grey")
UNITS: tuple[mole.Granularity, ...] = ("matrix", "layer", "block", "network")
POOLS: tuple[mole.Pool, ...] = ("token", "prompt_mean")


class Gated:
    """Attached gates with the oracle's numbers, and both ways to compute."""

    def __init__(
        self,
        root: Path,
        family: str = "llama",
        granularity: mole.Granularity = "layer",
        pool: mole.Pool = "token",
        num_experts: int = 3,
        gate_std: float = 0.3,
        double: bool = True,
        **options: Any,
    ):
        self.family, self.double = family, double
        self.config = mole.Config(granularity=granularity, pool=pool)
        model = self.base()
        self.params = mole_params(model, num_experts, self.config, gate_std=gate_std)
        folders = write_experts(
            lambda: build_pico(family),
            self.params,
            root / f"{family}{num_experts}",
            NAMES[:num_experts],
        )
        config = MoLEConfig(adapters=folders, granularity=granularity, pool=pool, **options)
        self.model = model
        self.handle = loramux.attach(model, config, backend="reference")
        self.units = copy_mole(self.handle, self.params, granularity)

    def base(self) -> nn.Module:
        return build_double(self.family) if self.double else build_pico(self.family)

    def run(self, ids: Tensor = IDS, mask: Tensor = MASK, prompt: Tensor | None = PROMPT) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask, prompt_mask=prompt).logits

    def oracle(
        self, params: mole.Params | None = None, **changes: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        return mole_model.oracle_logits(
            self.base().requires_grad_(False),
            IDS,
            MASK,
            PROMPT,
            self.params if params is None else params,
            self.config._replace(**changes),
        )

    def records(self) -> dict[str, RouteRecord]:
        return {record.path: record for record in self.handle.routing()}


def assert_is_oracle(gated: Gated, **changes: Any) -> None:
    got = gated.run().detach()
    expected, details = gated.oracle(**changes)
    close(got[REAL], expected.detach()[REAL])
    records = gated.records()
    assert len(records) == len(details["gates"])
    for unit, weights in details["gates"].items():
        record = records[gated.units[unit]]
        weights = weights.detach().to(expected.dtype)
        if gated.config.pool == "token":
            close(record.gates.detach()[REAL.reshape(-1)], weights[REAL])
        else:
            close(record.gates.detach(), weights)
    excess = gated.handle.aux_losses()["default/balance"]
    torch.testing.assert_close(
        excess.detach().double(), 0.5 * details["balance_excess"].double(), atol=1e-5, rtol=1e-5
    )
