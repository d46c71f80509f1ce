"""Weights of a quantised base that are a tensor subclass and call themselves fp32: no kernel reads their memory."""

from __future__ import annotations

import torch
from torch import nn

import loramux
from engine.crowd import build_engine
from loramux.formats.digest import tensor_digest
from pico import build_pico

PATH = "model.layers.0.mlp.up_proj"


class Disguised(torch.Tensor):
    """What libraries make of a weight: another type, the dtype of the original."""


class InParts(torch.Tensor):
    """Several tensors behind one name."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_part"], None


def disguised() -> nn.Module:
    model = build_pico("llama")
    layer = model.get_submodule(PATH)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Disguised), requires_grad=False)
    assert type(layer.weight) is Disguised
    return model


def test_the_engine_leaves_such_a_linear_to_torch():
    with build_engine(model=disguised(), check_base=False) as engine:
        groups = {path: g for g in engine._parts.runner.wiring.groups for path in g.paths}
        assert not groups[PATH].is_fusable
        assert groups["model.layers.0.self_attn.q_proj"].is_fusable


def test_an_attached_model_leaves_such_a_linear_to_torch():
    handle = loramux.attach(disguised(), loramux.LoraConfig())
    assert handle.dispatch.unfused == {PATH}


def test_the_digest_covers_the_parts_of_such_a_weight():
    def digest(value: float) -> str:
        weight = torch.zeros(2, 2).as_subclass(InParts)
        weight.data_part = torch.full((3,), value)
        return tensor_digest({}, {"weight": weight})

    assert digest(1.0) == digest(1.0) != digest(2.0)
