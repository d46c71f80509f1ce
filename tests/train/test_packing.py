"""A base whose packed samples see each other is refused before the first step; all others train."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    MptConfig,
    OPTConfig,
)

import loramux
from loramux.train import Job, Trainer, TrainingConfig
from loramux.train.packing import PackingError, check_packing
from pico import FAMILIES, PAD, build_pico
from train.toys import examples

SIZES = {"vocab_size": 96, "hidden_size": 32}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, Any] = {
    "falcon": FalconConfig(**SIZES, **DEPTH),
    "bloom": BloomConfig(**SIZES, n_layer=2, n_head=4),
    "mpt": MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "opt": OPTConfig(**SIZES, **DEPTH, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": GPTNeoXConfig(**SIZES, **DEPTH, intermediate_size=48),
}


def other(kind: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[kind])
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def attached(model: Any) -> loramux.Handle:
    return loramux.attach(model, loramux.LoraConfig(r=2, target_modules="all-linear"))


def job(packing: bool) -> Job:
    training = TrainingConfig(steps=1, learning_rate=1e-3, micro_batch_size=4)
    return Job(
        "default",
        train=examples(8),
        training=training,
        pad_token_id=PAD,
        packing=packing,
        sequence_len=32,
    )


@pytest.mark.parametrize("kind", ["falcon", "bloom", "mpt", "opt"])
def test_a_model_whose_samples_would_see_each_other_trains_unpacked_only(kind: str) -> None:
    model = other(kind)
    handle = attached(model)
    with pytest.raises(PackingError, match=rf"'{kind}'.*set data.packing: false"):
        Trainer(model, handle, [job(packing=True)])
    assert not model.training
    assert handle.dispatch.active == "default"
    assert Trainer(model, handle, [job(packing=False)]).run()[0].status == "finished"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_supported_family_passes(family: str, dtype: torch.dtype) -> None:
    model = build_pico(family, dtype=dtype)
    check_packing(model, attached(model), examples(8))


def test_a_family_that_nobody_listed_passes_if_its_samples_stay_apart() -> None:
    model = other("gpt_neox")
    check_packing(model, attached(model), examples(8))
