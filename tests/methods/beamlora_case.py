"""A BeamLoRA with the oracle's numbers, and one under training: what the tests of the method share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import loramux
from loramux.core.controller import Edit, Moment
from loramux.core.edits import Editor
from loramux.methods.beamlora import BeamController, BeamLoRAConfig, RankScores
from methods.bridge import adapter_of, build_double
from oracles import beamlora
from oracles.random_params import generator, layer_linears
from oracles.surgery import base_weight
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
RANK, ALPHA, TAU = 4, 6.0, 0.05
SMALL = ("q_proj", "down_proj")


def gate_at(handle: loramux.Handle, path: str) -> RankScores:
    gate = adapter_of(handle).rows[path].gate
    assert isinstance(gate, RankScores)
    return gate


def attached(family: str = "llama") -> tuple[nn.Module, loramux.Handle, dict[str, beamlora.Layer]]:
    """In double precision, random rows and scores; the oracle's layers share the numbers."""
    model, draw = build_double(family), generator(0)
    params = {}
    for path in layer_linears(model):
        d_out, d_in = base_weight(model.get_submodule(path))[0].shape
        params[path] = beamlora.random_layer(d_in, d_out, RANK, ALPHA / RANK, TAU, draw)
    config = BeamLoRAConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, temperature=TAU)
    handle = loramux.attach(model, config, backend="reference")
    for path, rows in adapter_of(handle).rows.items():
        layer, gate = params[path], gate_at(handle, path)
        rows.a.data, rows.b.data = layer.A.clone(), layer.B.T.contiguous().clone()
        gate.double().logits.data = layer.gamma.clone()
        gate.temperature.fill_(TAU)
    return model, handle, params


def shared_layers(handle: loramux.Handle) -> dict[str, beamlora.Layer]:
    """The oracle's layers as leaves of the attached adapter's autograd."""
    return {
        path: beamlora.Layer(
            rows.a, rows.b.T, gate_at(handle, path).logits, rows.spans.scale[0], TAU
        )
        for path, rows in adapter_of(handle).rows.items()
    }


class Training:
    """A BeamLoRA in training by hand: steps on noise, so that every rank, score and moment differs."""

    def __init__(
        self, num_steps: int = 48, seed: int = 0, peak_lr: float = 1e-2, **settings: Any
    ) -> None:
        config = {"r": RANK, "target_modules": SMALL, "interval": 4, **settings}
        torch.manual_seed(seed)
        self.handle = loramux.attach(build_pico("llama"), BeamLoRAConfig(**config))
        self.adapter = adapter_of(self.handle)
        self.parameters = self.handle.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-2, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator().manual_seed(99)
        self.editor = Editor(self.adapter, self.optimizer, self.parameters, self.generator)
        self.controller = self.adapter.method.controller()
        assert isinstance(self.controller, BeamController)
        self.num_steps, self.peak_lr = num_steps, peak_lr
        self.step = 0
        self.edits: list[Edit] = list(self.controller.before_training(self.moment()))

    def moment(self) -> Moment:
        return Moment(
            step=self.step,
            num_steps=self.num_steps,
            steps_per_epoch=10.0,
            peak_lr=self.peak_lr,
            adapter=self.adapter,
            handle=self.handle,
            optimizer=self.optimizer,
            parameters=self.parameters,
            generator=self.generator,
            edit=self.editor,
            samples=None,
        )

    def learn(self) -> None:
        """One optimizer step, without the controller."""
        for parameter in self.parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=self.noise)
        self.optimizer.step()
        self.step += 1

    def control(self) -> Sequence[Edit]:
        assert self.controller is not None
        edits: Sequence[Edit] = self.controller.after_step(self.moment())
        self.edits += edits
        return edits

    def advance(self, num: int = 1) -> Sequence[Edit]:
        """What the controller did after the last of `num` steps."""
        done: Sequence[Edit] = ()
        for _ in range(num):
            self.learn()
            done = self.control()
        return done

    def gates(self) -> dict[str, RankScores]:
        return {path: gate_at(self.handle, path) for path in self.adapter.rows}

    def scores(self) -> dict[str, list[float]]:
        return {path: gate().double().tolist() for path, gate in self.gates().items()}

    def everything(self) -> dict[str, Tensor]:
        """A copy of all that an event could change."""
        found = {name: p.detach().clone() for name, p in self.adapter.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                found[f"{name}|{key}"] = value.clone()
        return found

    def ranks(self) -> dict[str, list[tuple[Any, ...]]]:
        """All that belongs to each rank of a site: A, B and their moments, as plain numbers."""
        found = {}
        for path, rows in self.adapter.rows.items():
            tensors: list[Tensor] = []
            for parameter in (rows.a, rows.b):
                state: Mapping[str, Tensor] = self.optimizer.state[parameter]
                tensors += [parameter, state["exp_avg"], state["exp_avg_sq"]]
            found[path] = [tuple(t[i].tolist() for t in tensors) for i in range(len(rows.a))]
        return found
