"""The ten oracles of SMoRA's specification, by number."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import loramux
from loramux.core.sites import find_sites
from loramux.core.types import RouteRecord
from loramux.methods.smora import RankRouter, SMoRAConfig, SMoRAMethod, max_violation
from methods import smora_shards
from methods.bridge import adapter_of, build_double, close, same_gradients
from methods.smora_case import (
    BATCH,
    CONFIGS,
    IDS,
    MASK,
    RANKS,
    REAL,
    attached,
    biases,
    routers,
    run,
    shared,
)
from oracles import smora
from oracles.surgery import model_logits
from pico import FAMILIES, build_pico


@pytest.mark.parametrize("family", FAMILIES)
def test_1_a_fresh_smora_is_the_base(family: str):
    model = build_pico(family)
    base = model_logits(model, IDS, MASK)
    loramux.attach(model, SMoRAConfig(r=8, activate_r=2), backend="reference")
    torch.testing.assert_close(run(model)[REAL], base[REAL], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_2_the_masked_product_is_the_gathered_one_in_output_and_every_gradient(
    name: str, family: str
):
    """All ranks times a gate with zeros, against gathers of the active ones: rows, routers and the input."""
    model, handle, _, config = attached(name, family, double=True)
    bare = build_double(family).requires_grad_(False)
    embed = bare.get_input_embeddings()
    both = torch.cat([IDS, IDS[:1]])  # a request twice: its tokens add up in every gradient
    x = embed(both).clone().requires_grad_()
    got = model(inputs_embeds=x, use_cache=False).logits
    expected = smora.oracle_logits(bare, shared(handle), config, inputs_embeds=x)
    close(got, expected)
    draw = torch.randn(expected.shape, dtype=torch.float64)
    same_gradients(handle, (got * draw).mean(), (expected * draw).mean())
    slopes = [torch.autograd.grad((y * draw).mean(), x)[0] for y in (got, expected)]
    close(slopes[0], slopes[1])


def test_2_the_oracles_two_forms_agree():
    draw = torch.Generator().manual_seed(1)
    layer = smora.random_layer(12, 7, 6, 2, draw, torch.float64)
    x = torch.randn(9, 12, generator=draw, dtype=torch.float64)
    config = smora.Config(4, 5.0, rho=2)
    sparse = smora.sparse_increment(x, layer, config)
    torch.testing.assert_close(sparse, smora.masked_increment(x, layer, config))


def test_2_a_decode_step_that_gathers_only_the_active_ranks_computes_the_same():
    """Few rows without gradients run as pairs of a token and a rank."""
    model, handle, _, _ = attached(double=False)
    expected = run(model).detach()
    handle.dispatch.requested_backend = "auto"
    with torch.no_grad():
        got = run(model)
    torch.testing.assert_close(got[REAL], expected[REAL], atol=2e-5, rtol=2e-5)


def test_3_all_ranks_under_a_constant_router_are_a_plain_lora():
    model, handle, params, _ = attached("all", double=True)
    for router in routers(handle).values():
        router.weight.data.zero_()
        router.bias.zero_()
    got = run(model).detach()
    for record in handle.routing():
        torch.testing.assert_close(record.gates, torch.ones_like(record.gates))
    lora = build_double()
    plain = loramux.attach(lora, loramux.LoraConfig(r=RANKS, lora_alpha=6.0), backend="reference")
    for path, rows in adapter_of(plain).rows.items():
        rows.a.data, rows.b.data = params[path].A.clone(), params[path].B.T.contiguous()
    close(got[REAL], run(lora).detach()[REAL])


@pytest.mark.parametrize("name", CONFIGS)
def test_4_the_gates_of_a_token_sum_to_k_over_exactly_k_ranks(name: str):
    model, handle, _, config = attached(name, double=True)
    run(model)
    records = handle.routing()
    assert len(records) == len(adapter_of(handle).routers)
    for record in records:
        gates = record.gates.repeat_interleave(config.rho, dim=1)
        assert ((gates != 0).sum(1) == config.k).all()
        torch.testing.assert_close(gates.sum(1), torch.full_like(gates[:, 0], config.k))


@pytest.mark.parametrize("name", ["default", "units", "biased"])
def test_5_ranks_that_no_token_activates_get_no_gradient(name: str):
    model, handle, _, config = attached(name, double=True)
    one = IDS[:1, :2]
    model(input_ids=one).logits.square().mean().backward()
    idle = 0
    for record in handle.routing():
        rows, router = adapter_of(handle).rows[record.path], routers(handle)[record.path]
        off_U = (record.gates == 0).all(0)
        off_R = off_U.repeat_interleave(config.rho)
        idle += int(off_U.sum())
        assert router.weight.grad is not None and rows.a.grad is not None
        assert rows.b.grad is not None
        assert not router.weight.grad[off_U].any()
        assert not rows.a.grad[off_R].any() and not rows.b.grad[off_R].any()
        assert rows.a.grad[~off_R].any() and router.weight.grad[~off_U].any()
    assert idle > 0


def router_of(num_units: int, width: int = 4, **settings: object) -> RankRouter:
    config = SMoRAConfig(r=num_units, **{"activate_r": 1, **settings})  # type: ignore[arg-type]
    return RankRouter(config, width, num_units)


def record_of(slot_NK: Tensor, num: int, valid_N: Tensor | None = None) -> RouteRecord:
    gates_NU = torch.zeros(len(slot_NK), num).scatter(1, slot_NK, 1.0)
    return record_of_gates(gates_NU, valid_N)


def record_of_gates(gates_NU: Tensor, valid_N: Tensor | None = None) -> RouteRecord:
    valid_N = torch.ones(len(gates_NU), dtype=torch.bool) if valid_N is None else valid_N
    names = tuple(str(unit) for unit in range(gates_NU.shape[1]))
    return RouteRecord("a", "p", 0, "token", names, gates_NU, valid=valid_N)


def test_6_the_bias_moves_by_u_towards_the_mean_count():
    router = router_of(4, bias_step=0.25)
    router.observed(record_of(torch.tensor([[0], [0], [0], [1], [2], [2], [3], [3]]), 4))
    assert not router.bias.any()  # counted, not yet moved
    router.balance()
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    assert router.bias.tolist() == smora.moved_bias([0.0] * 4, [3, 1, 2, 2], 0.25)
    router.balance()  # nothing counted since
    assert router.bias.tolist() == [-0.25, 0.25, 0.0, 0.0]


def test_6_evaluation_leaves_the_bias_alone():
    model, handle, _, _ = attached(bias_step=0.1, update_every="forward")
    before = biases(handle)
    run(model)
    model.train()
    with torch.no_grad():
        run(model)
    assert all(torch.equal(bias, before[path]) for path, bias in biases(handle).items())
    for _ in range(2):  # it moves between two training forwards, not inside one
        run(model)
    assert all(not torch.equal(bias, before[path]) for path, bias in biases(handle).items())


def test_7_skewed_scores_are_balanced():
    """The planted task of the specification: scores with offsets, fresh tokens in every step."""
    width, num, active, tokens, steps, window = 8, 16, 4, 2048, 1500, 100
    draw = torch.Generator().manual_seed(0)
    router = router_of(num, width, activate_r=active, bias_step=2e-3)
    router.weight.data = torch.randn(num, width, generator=draw)
    offset_U = 0.5 * torch.randn(num, generator=draw)
    first, last = torch.zeros(num), torch.zeros(num)
    for step in range(steps):
        x_ND = torch.randn(tokens, width, generator=draw) / width**0.5
        gates_NU, _ = router.gates((x_ND @ router.weight.detach().T) + offset_U)
        router.observed(record_of_gates(gates_NU))
        assert router.counts is not None
        if step == 0:
            first = router.counts.float()
        if step >= steps - window:
            last += router.counts
        router.balance()
    assert max_violation(first) > 0.5
    assert max_violation(last) < 0.05


def test_8_whole_blocks_are_a_top_1_mixture_of_loras():
    draw = torch.Generator().manual_seed(2)
    num, rank, alpha = 4, 2, 6.0
    model = build_double()
    config = SMoRAConfig(r=num * rank, activate_r=rank, rank_partition=rank, lora_alpha=alpha)
    handle = loramux.attach(model, config, backend="reference")
    for path, router in routers(handle).items():
        rows = adapter_of(handle).rows[path]
        layer = smora.random_layer(
            rows.a.shape[1], rows.b.shape[1], num * rank, rank, draw, torch.float64
        )
        rows.a.data, rows.b.data = layer.A, layer.B.T.contiguous()
        router.weight.data, router.bias = layer.router, torch.zeros(num, dtype=torch.float64)
    layers = {path: layer._replace(B=layer.B) for path, layer in shared(handle).items()}
    path = next(iter(layers))
    linear = model.get_submodule(path)
    seen: list[tuple[Tensor, Tensor]] = []
    linear.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    run(model)
    x, got = (entry.reshape(-1, entry.shape[-1]) for entry in seen[0])
    base = torch.nn.functional.linear(x, linear.weight, linear.bias)
    close((got - base).detach(), smora.top_1_mixture(x, layers[path], num, alpha).detach())


def test_9_two_shards_with_summed_counts_move_the_bias_as_the_whole_batch():
    draw = torch.Generator().manual_seed(3)
    slot_NK = torch.rand(40, 6, generator=draw).argsort(1)[:, :2]
    valid_N = torch.rand(40, generator=draw) < 0.8
    whole, *shards = (router_of(6, activate_r=2, bias_step=0.1) for _ in range(3))
    whole.observed(record_of(slot_NK, 6, valid_N))
    for shard, at in zip(shards, (slice(0, 13), slice(13, 40)), strict=True):
        shard.observed(record_of(slot_NK[at], 6, valid_N[at]))
    assert shards[0].counts is not None and shards[1].counts is not None
    together = shards[0].counts + shards[1].counts
    for shard in shards:
        shard.counts = together.clone()  # what the sum over processes gives each of them
    for router in (whole, *shards):
        router.balance()
    assert whole.bias.any()
    assert all(torch.equal(shard.bias, whole.bias) for shard in shards)
    chosen = [row for row, valid in zip(slot_NK.tolist(), valid_N.tolist(), strict=True) if valid]
    expected = smora.moved_bias([0.0] * 6, smora.counts(chosen, 6), 0.1)
    torch.testing.assert_close(whole.bias, torch.tensor(expected))


def test_9_two_processes_with_half_the_batch_each_move_the_bias_as_one_with_all(tmp_path: Path):
    for shard in smora_shards.in_processes(2, tmp_path):
        for update_every, biases_of in shard.items():
            whole = smora_shards.trained(0, 1, update_every)
            assert any(bias.any() for bias in whole.values())
            assert all(torch.equal(bias, biases_of[path]) for path, bias in whole.items())


@pytest.mark.parametrize("update_every", ["step", "forward"])
def test_9_activation_checkpointing_counts_every_token_once_and_changes_no_gradient(
    update_every: str,
):
    def moved(checkpointed: bool) -> dict[str, Tensor]:
        model, handle, _, _ = attached(bias_step=0.1, update_every=update_every)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for _ in range(2):  # the second with a bias
            model.zero_grad()
            model(**BATCH).loss.backward()
        for router in routers(handle).values():
            assert router.counts is not None
            assert router.counts.sum() == 3 * MASK.sum()  # padding does not count
            router.balance()
        slopes = {name: p.grad for name, p in handle.trainable_parameters().items()}
        assert all(slope is not None and slope.any() for slope in slopes.values())
        return {**biases(handle), **slopes}  # type: ignore[dict-item]

    plain, checkpointed = moved(False), moved(True)
    for name, want in plain.items():
        torch.testing.assert_close(
            checkpointed[name], want, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_10_rows_router_bias_and_config_make_a_round_trip(tmp_path: Path):
    model, handle, _, _ = attached()
    expected = run(model)
    folder = handle.save(tmp_path / "mixture")
    assert [path.name for path in (folder / "experts").iterdir()] == ["ranks"]
    loaded = loramux.load(build_pico("llama"), folder, backend="reference")
    assert adapter_of(loaded).method.config == adapter_of(handle).method.config
    state = {name: tensor.clone() for name, tensor in adapter_of(handle).state_dict().items()}
    for name, tensor in adapter_of(loaded).state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert any(name.endswith(".bias") and tensor.any() for name, tensor in state.items())
    assert torch.equal(run(loaded.model), expected)


def test_10_all_linears_of_llama_2_7b_at_rank_64_have_the_papers_parameters():
    sizes = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    method = SMoRAMethod(SMoRAConfig())
    with torch.device("meta"):
        sites = find_sites(AutoModelForCausalLM.from_config(sizes))
        found = method.routers(sites)
    rows = sum(e.rank * (s.d_in + s.d_out) for s in sites for e in method.experts(s))
    weights = sum(p.numel() for router in found.values() for p in router.parameters())
    assert (rows, weights) == (159_907_840, 72_876_032)
    assert rows + weights == 232_783_872
    assert sum(b.numel() for router in found.values() for b in router.buffers()) == 14_336
