"""A quantised base: its linears stay what they are and run in torch, adapters are added behind them."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from torch import Tensor, nn

from conformance.cases import Maker, variants_of
from engine.crowd import (
    assert_like_core,
    build_engine,
    drive,
    greedy,
    load_all,
    random_prompt,
    record,
    save_variants,
)
from loramux.core.sites import find_sites
from pico import build_pico


class Int8Linear(nn.Linear):
    """As the libraries do it: whole numbers and a scale per output; only its own forward knows how to read them."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


def quantised() -> nn.Module:
    model = build_pico("llama")
    for site in find_sites(model):
        parent, _, name = site.path.rpartition(".")
        block = model.get_submodule(parent)
        setattr(block, name, Int8Linear(getattr(block, name)))
    return model


def test_a_quantised_base_answers_as_the_core_does(tmp_path: Path):
    make = Maker(tmp_path / "experts")
    variants = variants_of("lora", "milora", "mixlora", "mole")
    plain = [v for v in variants if "dora" not in v.label]
    folders = save_variants(make, tmp_path, plain, "llama")
    model = quantised()
    handle = load_all(copy.deepcopy(model), folders, check_base=False)
    draw = random.Random(2)
    requests = [greedy(random_prompt(draw), name, 5, id=str(name)) for name in [None, *folders]]
    with build_engine(model=model, check_base=False) as engine:
        for name, path in folders.items():
            engine.add_adapter(name, path)
        seen = record(engine)
        done = drive(engine, requests, draw)
    assert_like_core(handle, requests, done, seen)
