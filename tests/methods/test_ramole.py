"""RAMoLE in a model: against the oracle under every option, leaving adapters out, saved and loaded, and refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loramux
from loramux.compose.lower import lower_adapter
from loramux.errors import LoramuxError
from loramux.methods.ramole import RAMoLEConfig
from methods.bridge import LORA_FAMILIES, adapter_of, close, copy_lora, same_gradients
from methods.frozen_case import IDS, MASK, REAL, Frozen
from methods.ramole_case import SITE, assert_is_oracle, oracle, routed, weights_of
from oracles import ramole
from oracles.random_params import lora_params
from pico import build_pico

FOUR = (4, 2, 3, 5)


@pytest.mark.parametrize("family", LORA_FAMILIES)
def test_logits_and_weights_are_the_oracles_in_every_family(tmp_path: Path, family: str):
    assert_is_oracle(routed(tmp_path, family=family, double=False), tolerance=5e-5)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, ramole.PLAIN),
        ({"router_rank": 1}, ramole.PLAIN),
        ({"logit_scale": 2.5}, ramole.Config(logit_scale=2.5)),
        ({"null_expert": True}, ramole.Config(null_expert=True)),
        ({"normalise_keys": True}, ramole.Config(normalise_keys=True)),
    ],
    ids=["plain", "rank-1", "scale", "null", "normalised"],
)
def test_logits_weights_and_gradients_are_the_oracles_under_every_option(
    tmp_path: Path, options: dict[str, Any], config: ramole.Config
):
    made = routed(tmp_path, std=0.3, **options)
    assert_is_oracle(made, config)
    ours = made.run()[REAL].square().mean()
    theirs = oracle(made, config)[0][REAL].square().mean()
    same_gradients(made.handle, ours, theirs, 1e-8)


def test_with_normalised_keys_the_size_of_an_adapter_does_not_win(tmp_path: Path):
    """B14: scaling an upload moves the score in the paper's form, and not under the option."""
    moved = {}
    for option in (False, True):
        made = routed(tmp_path / str(option), normalise_keys=option)
        first, path = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
        made.run()
        before = weights_of(made)[first]
        made.handle.adapters["default"].rows[path].b.data[:4] *= 3
        made.run()
        moved[option] = float((weights_of(made)[first] - before).abs().max())
    assert moved[True] < 1e-6 < 1e-2 < moved[False]


# -- leaving adapters out --------------------------------------------------------------------------


def trained_step(made: Frozen) -> tuple[bool, ...]:
    """One forward pass in training mode; who acted."""
    made.model.train()
    made.model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    acted = {tuple((r.gates.detach() > 0).any(0).tolist()) for r in made.handle.routing()}
    assert len(acted) == 1, "one draw for all linears"
    return acted.pop()


def test_a_step_leaves_out_about_half_of_the_adapters_and_never_all_but_one(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig, ranks=FOUR, double=False)
    torch.manual_seed(0)
    seen = [trained_step(made) for _ in range(30)]
    assert {sum(kept) for kept in seen} == {2, 3, 4}
    assert len(set(seen)) > 6
    share = sum(map(sum, seen)) / (4 * len(seen))
    assert 0.5 <= share < 0.75  # 0.61 is what p = 0.5 leaves when fewer than two are drawn again


def test_weights_of_those_that_stay_sum_to_one_and_the_others_get_no_gradient(tmp_path: Path):
    made = routed(tmp_path, ranks=FOUR, double=False, adapter_dropout=0.5)
    torch.manual_seed(1)
    kept = trained_step(made)
    assert not all(kept)
    for record in made.handle.routing():
        gates = record.gates.detach()
        torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates)))
        assert gates[:, [i for i, one in enumerate(kept) if not one]].eq(0).all()


def test_outside_training_and_with_two_adapters_nobody_is_left_out(tmp_path: Path):
    made = Frozen(tmp_path / "many", RAMoLEConfig, ranks=FOUR, double=False, adapter_dropout=0.9)
    for _ in range(5):
        made.run()
        assert all(weight.gt(0).all() for weight in weights_of(made).values())
    pair = Frozen(tmp_path / "pair", RAMoLEConfig, ranks=(4, 2), double=False, adapter_dropout=0.9)
    assert all(all(trained_step(pair)) for _ in range(5))


def test_a_layer_that_runs_again_in_backward_sees_the_same_adapters(tmp_path: Path):
    grads = []
    for checkpointed in (False, True):
        made = routed(
            tmp_path / str(checkpointed), ranks=FOUR, double=False, adapter_dropout=0.5, std=0.3
        )
        if checkpointed:
            made.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        made.model.train()
        for _ in range(3):  # the second and third draw are other ones
            made.model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append([p.grad for p in made.handle.trainable_parameters().values()])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None and again is not None
        torch.testing.assert_close(plain, again, atol=1e-5, rtol=1e-4)


# -- files -----------------------------------------------------------------------------------------


def test_saved_and_loaded_the_router_and_the_logits_are_the_same(tmp_path: Path):
    made = routed(tmp_path / "adapters", double=False)
    expected = made.run()
    folder = made.handle.save(tmp_path / "mixture")
    tensors = load_file(folder / "router.safetensors")
    site = SITE.replace(".", "/")
    assert {name.rpartition(".")[2] for name in tensors} == {"A_r", "B_r"}
    assert tensors[f"{site}.A_r"].shape[0] == 6 == tensors[f"{site}.B_r"].shape[1]
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    assert torch.equal(loaded.model(input_ids=IDS, attention_mask=MASK).logits, expected)


def test_the_top_folder_is_no_lora_that_peft_would_apply_as_a_change(tmp_path: Path):
    folder = routed(tmp_path / "adapters", double=False).handle.save(tmp_path / "mixture")
    assert not (folder / "adapter_config.json").exists()


def test_a_masked_adapter_gets_nothing_and_the_others_share(tmp_path: Path):
    made = routed(tmp_path)
    made.handle.mask_experts({"green": False})
    made.run()
    for weight in weights_of(made).values():
        assert weight[:, 1].eq(0).all()
        torch.testing.assert_close(weight.sum(-1), torch.ones(10).double())
    made.handle.mask_experts({"green": False, "blue": False})
    close(made.run().detach()[REAL], made.alone(0)[REAL])


def test_what_is_kept_of_a_router_follows_its_tensors(tmp_path: Path):
    made = routed(tmp_path)
    adapter_of(made.handle).set_trainable(False)
    made.run()
    kept = made.routers[SITE]._kept
    made.run()
    assert made.routers[SITE]._kept is kept is not None
    for router in made.routers.values():
        router.B_r.data.mul_(-0.5)
        router.B_r.data = router.B_r.data.clone()
    assert_is_oracle(made)
    with torch.inference_mode():
        made.run()
    for router in made.routers.values():
        router.requires_grad_(True)
    made.run()[REAL].square().mean().backward()


def test_in_bfloat16_the_router_decides_in_float32(tmp_path: Path):
    made = routed(tmp_path, double=False)
    model: Any = build_pico("llama", dtype=torch.bfloat16)
    folder = made.handle.save(tmp_path / "mixture")
    handle = loramux.load(model, folder, check_base=False)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert logits.isfinite().all()
    for record in handle.routing():
        assert record.gates.dtype == torch.float32
        torch.testing.assert_close(record.gates.sum(-1), torch.ones(12))


# -- refusals --------------------------------------------------------------------------------------


def test_no_plain_adapter_does_the_same_and_lower_says_so(tmp_path: Path):
    made = routed(tmp_path / "adapters", double=False)
    folder = made.handle.save(tmp_path / "mixture")
    base = tmp_path / "base"
    build_pico("llama").save_pretrained(base)
    from loramux.eval.loading import Loaded

    with pytest.raises(LoramuxError, match="RAMoLE, which routes every token anew"):
        lower_adapter(
            folder, tmp_path / "out", base=Loaded(build_pico("llama"), None, None), check_base=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_rank": 0}, "router_rank must be at least 1"),
        ({"adapter_dropout": 1.0}, r"adapter_dropout must be a number in \[0, 1\)"),
        ({"logit_scale": 0.0}, "logit_scale must be a finite number above 0"),
        ({"null_expert": "no"}, "null_expert must be true or false"),
        ({"lora_dropout": 0.1}, "adapter_dropout leaves out whole adapters"),
        ({"use_dora": True}, "use_dora does not apply"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        RAMoLEConfig(adapters=("x/red", "x/green"), **options)


def test_adapters_are_needed_and_dora_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="needs trained adapters"):
        loramux.attach(build_pico("llama"), RAMoLEConfig())
    handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4, use_dora=True))
    copy_lora(handle, lora_params(build_pico("llama"), 4, scale=4.0, dora=True))
    folder = handle.save(tmp_path / "dora")
    with pytest.raises(ValueError, match="DoRA"):
        loramux.attach(build_pico("llama"), RAMoLEConfig(adapters=(str(folder),)))
