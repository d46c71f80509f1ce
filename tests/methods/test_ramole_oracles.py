"""The twelve oracles of RAMoLE's specification, by number."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from loramux.core.router import RouteView
from loramux.core.types import EVERYTHING, Site
from loramux.methods.ramole import RAMoLEConfig, RouterLoRA, Survivors
from loramux.ops.contract import Spans
from loramux.persist.ramole import assemble, read_router
from methods.bridge import adapter_of, close
from methods.frozen_case import IDS, MASK, REAL, Frozen, merged_logits, piecewise, random_experts
from methods.ramole_case import SITE, assert_is_oracle, routed, set_router, weights_of
from oracles import ramole
from oracles.lora import LowRank
from pico import build_pico


def test_1_one_adapter_acts_in_full_whatever_the_router_holds(tmp_path: Path):
    for std in (0.0, 2.0):
        made = routed(tmp_path / str(std), std=std, ranks=(4,))
        close(made.run().detach()[REAL], made.alone(0)[REAL])


def test_2_copies_of_one_adapter_give_its_output(tmp_path: Path):
    first = random_experts(build_pico("llama"), (4,))
    same = {site: [entries[0]] * 3 for site, entries in first.items()}
    made = routed(tmp_path, experts=same, double=False)
    close(made.run().detach()[REAL], made.alone(0)[REAL])


@pytest.mark.parametrize("which", ["A_r", "B_r"])
def test_3_a_router_of_zeros_is_the_uniform_mixture(tmp_path: Path, which: str):
    made = routed(tmp_path)
    for router in made.routers.values():
        getattr(router, which).data.zero_()
    close(made.run().detach()[REAL], merged_logits(made, [1 / 3] * 3)[REAL], 1e-6)


def test_3_a_fresh_router_is_the_uniform_mixture(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig)
    assert all(r.B_r.eq(0).all() and r.A_r.ne(0).any() for r in made.routers.values())
    close(made.run().detach()[REAL], merged_logits(made, [1 / 3] * 3)[REAL], 1e-6)


def test_4_the_weights_of_every_token_and_linear_lie_on_the_simplex(tmp_path: Path):
    made = routed(tmp_path)
    made.run()
    found = weights_of(made)
    assert len(found) == 14
    for weight in found.values():
        assert weight.min() >= 0
        torch.testing.assert_close(weight.sum(-1), torch.ones(10).double())
    assert max(float(weight.max()) for weight in found.values()) > 0.5, "the router has an opinion"


def test_5_another_order_of_adapters_moves_the_weights_and_leaves_the_output(tmp_path: Path):
    made = routed(tmp_path / "one")
    order = [2, 0, 1]
    turned = {site: [entries[i] for i in order] for site, entries in made.experts.items()}
    other = routed(tmp_path / "other", experts=turned)
    close(other.run().detach()[REAL], made.run().detach()[REAL])
    mine, theirs = weights_of(made), weights_of(other)
    for path in mine:
        close(theirs[path], mine[path][:, order])


# -- 6: forms of a batch ---------------------------------------------------------------------------

CHOSEN = ([0, 1, 2], [3, 1, 4], [2, 4, 0])


def layer_case(seed: int = 0) -> tuple[Tensor, list[LowRank], ramole.Router]:
    """Five LoRAs of other ranks and scales at one linear, three samples."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    pool = [
        LowRank(normal(r, 16), normal(12, r) / 4, scale)
        for r, scale in ((2, 1.0), (4, 0.5), (1, 3.0), (3, 2.0), (6, 0.25))
    ]
    return normal(3, 7, 16), pool, ramole.Router(normal(6, 16) / 4, normal(12, 6) / 4)


def our_layer(
    x_BLI: Tensor, experts: Sequence[LowRank], router: ramole.Router, **options: Any
) -> tuple[Tensor, Tensor]:
    """(sum of the weighed values, weights) of the cheap rank form."""
    names = tuple(f"adapter{i}" for i in range(len(experts)))
    config = RAMoLEConfig(adapters=names, router_rank=router.A.shape[0], **options)
    width, out = router.A.shape[1], router.B.shape[0]
    site = Site("s", "s", 0, "l", "b", "other", "plain", width, out, width)
    made = RouterLoRA(config, site, Survivors(len(names), 0.0)).double().requires_grad_(False)
    made.A_r.data, made.B_r.data = router.A.clone(), router.B.clone()
    spans = Spans.packed([e.A.shape[0] for e in experts], [e.scale for e in experts])
    rows = loramux.Rows(
        spans, torch.cat([e.A for e in experts]), torch.cat([e.B.T for e in experts])
    )
    made.bind(rows)
    flat = x_BLI.reshape(-1, width)
    everybody = torch.ones(len(flat), dtype=torch.bool)
    view = RouteView(
        flat, torch.zeros(len(flat), dtype=torch.long), everybody, everybody, 1, False,
        lambda **_: None,
    )  # fmt: skip
    weight_NE = made(view, EVERYTHING).weight
    assert weight_NE is not None
    u_NR = (flat @ rows.a.T) * (weight_NE[:, spans.row_slot_R] * spans.row_scale_R)
    return (u_NR @ rows.b).view(*x_BLI.shape[:-1], out), weight_NE


def test_6_gathered_masked_one_by_one_and_the_rank_form_agree():
    x, pool, router = layer_case()
    expected = ramole.gathered(x, pool, CHOSEN, router)
    close(ramole.masked(x, pool, CHOSEN, router), expected)
    for b, own in enumerate(CHOSEN):
        set_ = [pool[i] for i in own]
        close(ramole.mixed(x[b : b + 1], set_, router)[0], expected[b : b + 1])
        close(our_layer(x[b : b + 1], set_, router)[0], expected[b : b + 1])


def test_6_rows_with_other_sets_in_one_batch_answer_as_alone(tmp_path: Path):
    made = routed(tmp_path / "trained", ranks=(4, 2, 3, 5), double=False)
    router = read_router(made.handle.save(tmp_path / "mixture"))
    sets = (("red", "green", "blue"), ("grey", "green"), ("blue",))
    folders = {Path(folder).name: folder for folder in made.folders}
    model: Any = build_pico("llama")
    handle = loramux.attach(model, loramux.LoraConfig(r=2))
    for number, own in enumerate(sets):
        parts = {name: folders[name] for name in own}
        handle.put(assemble(model, parts, router, name=f"set{number}", **known_of(handle)))
    names = ["set0", "set1", "set2", None]
    ids = torch.randint(4, 90, (4, 6), generator=torch.Generator().manual_seed(1))

    def run(names: list[str | None], ids: Tensor) -> Tensor:
        with handle.batch(adapters=names), torch.no_grad():
            return model(input_ids=ids).logits

    together = run(names, ids)
    for row, name in enumerate(names):
        close(together[row : row + 1], run([name], ids[row : row + 1]))
    changed = ids.clone()
    changed[1] = 7
    after = run(names, changed)
    for row in (0, 2, 3):
        close(after[row], together[row])
    assert not torch.allclose(after[1], together[1])


def known_of(handle: loramux.Handle) -> dict[str, Any]:
    """What `assemble` cannot find out from a model whose linears are wrapped."""
    return {"sites": list(handle.sites.values()), "check_base": False}


# -- 7 to 12 ---------------------------------------------------------------------------------------


def test_7_only_the_router_learns_and_a_r_from_the_second_step_on(tmp_path: Path):
    made = Frozen(tmp_path, RAMoLEConfig, double=False)
    trained = made.handle.trainable_parameters()
    assert {name.rpartition(".")[2] for name in trained} == {"A_r", "B_r"}
    assert len(trained) == 2 * len(made.routers) == 28
    before = {
        name: p.detach().clone() for name, p in made.model.named_parameters() if name not in trained
    }
    frozen = {name: p for name, p in before.items() if not name.endswith(("A_r", "B_r"))}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    made.model.train()
    for step in range(2):
        made.model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            is_zero = bool(parameter.grad.eq(0).all())
            assert is_zero == (step == 0 and name.endswith("A_r")), (step, name)
        optimizer.step()
        optimizer.zero_grad()
    after = dict(made.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())


def test_8_the_router_adds_nothing_of_its_own(tmp_path: Path):
    made = routed(tmp_path, std=3.0)
    for rows in adapter_of(made.handle).rows.values():
        rows.b.data.zero_()
    with torch.no_grad():
        base = made.base()(input_ids=IDS, attention_mask=MASK).logits
    close(made.run().detach()[REAL], base[REAL])


def test_9_an_adapter_the_router_never_saw_joins_and_leaves_without_training(tmp_path: Path):
    made = routed(tmp_path / "trained", ranks=(4, 2), double=False)
    folder = made.handle.save(tmp_path / "mixture")
    late = random_experts(build_pico("llama"), (4, 2, 3))
    stranger = Frozen(tmp_path / "late", RAMoLEConfig, experts=late, double=False).folders[2]
    known = {"a": made.folders[0], "b": made.folders[1]}

    def run(folders: dict[str, str]) -> tuple[Tensor, loramux.Handle]:
        model: Any = build_pico("llama")
        adapter = assemble(model, folders, folder, name="default")
        handle = loramux.attach(model, loramux.LoraConfig(r=2), name="other")
        handle.put(adapter)
        handle.use("default")
        with torch.no_grad():
            return model(input_ids=IDS, attention_mask=MASK).logits, handle

    before, handle = run(known)
    close(before[REAL], made.run().detach()[REAL])
    more, joined = run({**known, "c": stranger})
    gates = torch.stack([record.gates for record in joined.routing("default")])
    assert gates.shape[-1] == 3 and (gates[..., 2] > 0).all()
    assert not torch.allclose(more[REAL], before[REAL])
    tensors = dict(adapter_of(joined).routers_by_key.state_dict())
    for name, tensor in adapter_of(handle).routers_by_key.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    assert torch.equal(run(known)[0], before)


@pytest.mark.parametrize("seed", range(3))
def test_10_a_router_learns_which_adapter_an_input_belongs_to(seed: int):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 4, 16, generator=draw) / 4
    b = torch.randn(2, 16, 4, generator=draw) / 2
    experts = [LowRank(a[i], b[i], 1.0) for i in range(2)]
    site = Site("s", "s", 0, "l", "b", "other", "plain", 16, 16, 16)
    torch.manual_seed(seed)
    config = RAMoLEConfig(adapters=("one", "two"))
    router = RouterLoRA(config, site, Survivors(2, 0.0))
    spans = Spans.packed([4, 4], [1.0, 1.0])
    router.bind(loramux.Rows(spans, a.reshape(8, 16), b.transpose(1, 2).reshape(8, 16)))
    strong = torch.cat([torch.ones(8), torch.full((8,), 0.05)])

    def inputs(number: int) -> tuple[Tensor, Tensor]:
        task = torch.randint(2, (number,), generator=draw)
        energy = torch.where(task[:, None] == 0, strong, strong.flip(0))
        return torch.randn(number, 16, generator=draw) * energy, task

    def weights(x: Tensor) -> Tensor:
        everybody = torch.ones(len(x), dtype=torch.bool)
        view = RouteView(x, everybody.long(), everybody, everybody, 1, True, lambda **_: None)
        found = router(view, EVERYTHING).weight
        assert found is not None
        return found

    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for _ in range(300):
        x, task = inputs(64)
        values = torch.stack([x @ e.A.T @ e.B.T for e in experts], 1)
        right = values[torch.arange(64), task]
        loss = ((weights(x).unsqueeze(-1) * values).sum(1) - right).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, task = inputs(2000)
    found = weights(x).detach()[torch.arange(2000), task].mean()
    assert found > 0.95, float(found)  # 0.96 with some energy in the other half, too
    swapped = loramux.Rows(
        spans, a.flip(0).reshape(8, 16), b.flip(0).transpose(1, 2).reshape(8, 16)
    )
    router.bind(swapped)
    torch.testing.assert_close(weights(x).detach()[torch.arange(2000), 1 - task].mean(), found)


def test_11_the_weights_of_an_input_and_its_opposite_are_the_same():
    x, pool, router = layer_case()
    torch.testing.assert_close(
        our_layer(x, pool, router)[1], our_layer(-x, pool, router)[1], atol=0, rtol=0
    )


def test_12_token_by_token_the_logits_are_those_of_the_whole(tmp_path: Path):
    made = routed(tmp_path, double=False)
    made.handle.dispatch.requested_backend = "auto"
    whole = made.run(IDS[:1], None).detach()
    close(piecewise(made.model, IDS[:1], [3, 1, 1, 1]), whole, 2e-5)


def test_a_linear_that_two_adapters_leave_out_is_shared_by_the_others(tmp_path: Path):
    """B4 and B5: they are masked there, which is not the same as adding nothing at their share."""
    experts = random_experts(build_pico("llama"), (4, 2, 3))
    holes = {
        site: [e[0] if "mlp" in site else None, e[1] if "q_proj" not in site else None, e[2]]
        for site, e in experts.items()
    }
    made = routed(tmp_path, experts=holes, double=False)
    assert_is_oracle(made, tolerance=2e-5)
    weights = weights_of(made)
    assert weights["model.layers.0.self_attn.q_proj"].eq(torch.tensor([0.0, 0.0, 1.0])).all()
    assert weights["model.layers.1.self_attn.k_proj"][:, 0].eq(0).all()
    assert (weights[SITE] > 0).any(0).all()
    made.handle.mask_experts({"blue": False})
    lonely = made.run().detach()
    assert weights_of(made)["model.layers.0.self_attn.q_proj"].eq(0).all()
    assert lonely.isfinite().all()


def test_the_router_can_be_moved_at_will_and_the_logits_are_still_the_oracles(tmp_path: Path):
    made = routed(tmp_path)
    for seed in range(3):
        set_router(made, 0.5 * (seed + 1), seed)
        assert_is_oracle(made)
