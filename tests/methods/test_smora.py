"""SMoRA beyond its oracles: what its config refuses, when its biases move, what a damaged folder says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loramux
from loramux.formats.digest import tensor_digest
from loramux.formats.peft import read_peft
from loramux.methods.smora import RankRouter, SMoRAConfig
from loramux.train import Job, Listener, StepEvent, Trainer, TrainingConfig
from methods.bridge import adapter_of
from methods.smora_case import BATCH, MASK, RANKS, attached, biases, routers, run
from pico import build_pico
from train.toys import examples


def test_the_defaults_are_the_released_ones():
    config = SMoRAConfig()
    assert (config.r, config.activate_r, config.lora_alpha, config.rank_partition) == (64, 8, 16, 1)
    assert config.bias_step == 1e-5
    assert not config.gate_from_biased and config.update_every == "step"
    handle = loramux.attach(build_pico("llama"), config)
    spans = next(iter(adapter_of(handle).rows.values())).spans
    assert set(spans.rank) == {1} and set(spans.scale) == {2.0} and spans.num_slots == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, "activate_r=8 and a rank of 4"),
        ({"rank_pattern": {"q_proj": 6}}, "a rank of 6"),
        ({"rank_partition": 3}, r"activate_r must be a multiple of rank_partition \(3\), got 8"),
        ({"r": 12, "rank_partition": 8}, "r must be a multiple"),
        ({"rank_partition": 8, "rank_pattern": {"q_proj": 9}}, r"rank_pattern\['q_proj'\] must be"),
        ({"activate_r": 0}, "activate_r must be at least 1"),
        ({"bias_step": -1.0}, "bias_step"),
        ({"score": "relu"}, "score must be one of"),
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "gaussian"}, "gaussian"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SMoRAConfig(**settings)


def test_with_rslora_the_scale_is_alpha_over_the_root_of_the_active_ranks():
    config = SMoRAConfig(r=8, activate_r=4, lora_alpha=6.0, use_rslora=True)
    handle = loramux.attach(build_pico("llama"), config)
    assert set(next(iter(adapter_of(handle).rows.values())).spans.scale) == {3.0}


def test_equal_scores_choose_the_lower_rank():
    router = RankRouter(SMoRAConfig(r=6, activate_r=2), 3, 6)
    gates_NU, _ = router.gates(torch.zeros(2, 6))
    assert gates_NU.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2


def test_biased_scores_that_sum_to_nothing_do_not_divide_by_zero():
    router = RankRouter(SMoRAConfig(r=4, activate_r=2, gate_from_biased=True), 3, 4)
    router.bias -= 0.5  # the scores of zero logits
    gates_NU, _ = router.gates(torch.zeros(1, 4))
    assert gates_NU.isfinite().all()


def test_a_record_says_which_ranks_every_token_used():
    model, handle, _, _ = attached()
    run(model)
    for record in handle.routing():
        assert record.columns == tuple(str(rank) for rank in range(RANKS))
        assert record.gates.shape == (MASK.numel(), RANKS)
        assert ((record.gates != 0).sum(1) == 3).all()
        assert record.probs is not None and not record.probs.requires_grad
        assert record.valid is not None and record.valid.tolist() == MASK.view(-1).bool().tolist()


# -- when the biases move ------------------------------------------------------------------------


def micro_batches() -> list[dict[str, Tensor]]:
    return [{name: entry[row : row + 1] for name, entry in BATCH.items()} for row in range(2)]


def test_counts_of_all_micro_batches_move_the_bias_once():
    whole, parts = attached(bias_step=0.1), attached(bias_step=0.1)
    whole[0].train()(**BATCH)
    for part in micro_batches():
        parts[0].train()(**part)
    for one, other in zip(routers(whole[1]).values(), routers(parts[1]).values(), strict=True):
        assert torch.equal(one.counts, other.counts)
        one.balance(), other.balance()
        assert torch.equal(one.bias, other.bias)


@pytest.mark.parametrize(("fused", "set_to_none"), [(True, True), (False, True), (False, False)])
def test_a_loop_that_knows_nothing_of_biases_still_moves_them_once_per_optimizer_step(
    fused: bool, set_to_none: bool
):
    model, handle, _, _ = attached(bias_step=0.125)
    optimizer = torch.optim.AdamW(handle.trainable_parameters().values(), lr=1e-3, fused=fused)
    start = biases(handle)
    model.train()
    for step in range(3):
        for part in micro_batches():
            loss = model(**part).loss
            model(**part)  # a forward pass that no backward pass follows is no step
            loss.backward()
            moved = [bias - start[path] for path, bias in biases(handle).items()]
            assert max(float(m.abs().max()) for m in moved) == pytest.approx(0.125 * step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def test_every_forward_moves_the_bias_where_that_is_asked_for():
    model, handle, _, _ = attached(bias_step=0.125, update_every="forward")
    start = biases(handle)
    for part in (*micro_batches(), BATCH):  # the next forward pass moves it
        model.train()(**part)
    moved = [bias - start[path] for path, bias in biases(handle).items()]
    assert max(float(m.abs().max()) for m in moved) == pytest.approx(0.25)


def test_our_trainer_moves_the_bias_after_every_step_and_leaves_nothing_pending(tmp_path: Path):
    model, handle, _, _ = attached(bias_step=0.125)
    start = biases(handle)
    training = TrainingConfig(steps=4, micro_batch_size=3, gradient_accumulation_steps=2)
    job = Job(name="default", train=examples(24), training=training)
    Trainer(model, handle, [job], out=tmp_path).run()
    most = 0.0
    for path, router in routers(handle).items():
        steps = (router.bias - start[path]) / 0.125
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        most = max(most, float(steps.abs().max()))
        assert router.counts is None
    assert 2 <= round(most) <= 4
    fresh = loramux.load(build_pico("llama"), tmp_path / "adapter")
    assert all(torch.equal(b, biases(handle)[path]) for path, b in biases(fresh).items())


def test_an_unused_branch_of_the_batch_is_not_counted():
    """Tokens of another adapter's requests are nobody's load here."""
    model, handle, _, _ = attached(bias_step=0.1)
    handle.add(loramux.LoraConfig(r=2), name="other")
    model.train()
    with handle.batch(["default", "other"]):
        model(**{key: BATCH[key] for key in ("input_ids", "attention_mask")})
    for router in routers(handle).values():
        assert router.counts is not None and router.counts.sum() == 3 * MASK[0].sum()


# -- folders -------------------------------------------------------------------------------------


def saved(tmp_path: Path, **settings: Any) -> Path:
    _, handle, _, _ = attached(**settings)
    return handle.save(tmp_path / "mixture")


def record_digests(folder: Path) -> None:
    path = folder / "mixture_config.json"
    header = json.loads(path.read_text())
    header["router"] = tensor_digest({}, load_file(folder / "router.safetensors"))
    for entry in header["experts"]:
        entry["digest"] = read_peft(folder / entry["path"]).digest
    path.write_text(json.dumps(header))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_router(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "router.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder: Path, message: str) -> None:
    record_digests(folder)
    model: nn.Module = build_pico("llama")
    with pytest.raises(ValueError, match=message):
        loramux.load(model, folder)


def test_all_ranks_are_one_peft_folder(tmp_path: Path):
    folder = saved(tmp_path)
    assert [path.name for path in (folder / "experts").iterdir()] == ["ranks"]
    config = json.loads((folder / "experts" / "ranks" / "adapter_config.json").read_text())
    assert config["r"] == RANKS and config["lora_alpha"] == pytest.approx(6.0 / 3 * RANKS)


def test_sites_of_other_ranks_and_scales_make_the_round_trip(tmp_path: Path):
    config = SMoRAConfig(
        r=8, activate_r=3, rank_pattern={"v_proj": 5}, alpha_pattern={r".*\.1\..*": 4.0}
    )
    model = build_pico("llama")
    handle = loramux.attach(model, config, backend="reference")
    for parameter in handle.trainable_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    expected = run(model)
    loaded = loramux.load(build_pico("llama"), handle.save(tmp_path / "m"), backend="reference")
    assert torch.equal(run(loaded.model), expected)


def test_another_number_of_ranks_than_the_config_says_is_refused(tmp_path: Path):
    folder = saved(tmp_path)
    edit_json(folder / "mixture_config.json", lambda c: c["config"].update(r=4))
    refused(folder, "8 rank rows, its config asks for 4")


def test_another_scale_than_the_config_says_is_refused(tmp_path: Path):
    folder = saved(tmp_path)
    edit_json(folder / "mixture_config.json", lambda c: c["config"].update(lora_alpha=7.0))
    refused(folder, "scaled with 2 in its folder and with 2.33")


def test_a_router_without_its_bias_is_refused(tmp_path: Path):
    folder = saved(tmp_path)
    edit_router(folder, lambda t: t.pop(next(key for key in t if key.endswith("bias"))))
    refused(folder, r"lacks \['model/layers/0.*bias'\]")


def test_a_bias_of_whole_numbers_is_refused(tmp_path: Path):
    folder = saved(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("bias"))
        tensors[key] = tensors[key].round().long()

    edit_router(folder, change)
    refused(folder, "int64")


def test_a_second_folder_of_experts_is_refused(tmp_path: Path):
    folder = saved(tmp_path)
    ranks = folder / "experts" / "ranks"
    ranks.rename(ranks.with_name("expert_0"))

    def change(header: dict[str, Any]) -> None:
        header["experts"][0].update(name="expert_0", path="experts/expert_0")

    edit_json(folder / "mixture_config.json", change)
    refused(folder, r"the order \['ranks'\]")


def test_a_nan_in_the_bias_is_refused(tmp_path: Path):
    folder = saved(tmp_path)
    edit_router(
        folder, lambda t: t[next(key for key in t if key.endswith("bias"))].fill_(float("nan"))
    )
    refused(folder, "NaN")


class StopAt(Listener):
    def __init__(self, step: int):
        self.step = step

    def stepped(self, trainer: Trainer, event: StepEvent) -> None:
        if event.step == self.step:
            trainer.stop()


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path):
    def state_after(out: Path, *stops: int) -> dict[str, Tensor]:
        for stop in (*stops, 6):
            torch.manual_seed(0)
            model, handle, _, _ = attached(bias_step=0.01)
            listeners = (StopAt(stop),)
            training = TrainingConfig(steps=6, micro_batch_size=3, gradient_accumulation_steps=2)
            job = Job(name="default", train=examples(24), training=training)
            Trainer(model, handle, [job], out=out, resume=True, listeners=listeners).run()
        return {name: t.clone() for name, t in adapter_of(handle).state_dict().items()}

    whole, stopped = state_after(tmp_path / "whole"), state_after(tmp_path / "stopped", 3)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
