"""Routers of single linears, dense routes, gates over rank rows, tied experts, rank masks and task ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import loramux
from core.gated import Gated, adapter
from loramux.core import bank
from loramux.core.bank import dora_gain, fresh_rows
from loramux.core.types import Expert, Site
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 3, 4]])


def attached(method: Gated, backend: str = "reference") -> loramux.Handle:
    model = build_pico("llama")
    handle = loramux.attach(model, loramux.LoraConfig(), backend=backend)
    handle.put(adapter(handle, method))
    handle.use("gated")
    return handle


def logits(handle: loramux.Handle, ids: Tensor = IDS) -> Tensor:
    found: Tensor = handle.model(ids).logits
    return found


def by_hand(handle: loramux.Handle) -> Tensor:
    """Every linear replaced by its formula, expert by expert."""
    made = handle.adapters["gated"]
    hooks = []
    for path, linear in handle.linears.items():
        rows, router = made.rows[path], made.routers.get(path)

        def formula(module: nn.Module, args: tuple[Tensor], y: Tensor, rows=rows, router=router):
            (x,) = args
            a = rows.a.repeat(rows.tied, 1) if rows.tied else rows.a
            if rows.gate is not None:
                a = a * rows.gate().unsqueeze(1)
            for slot, scale in enumerate(rows.spans.scale):
                at = rows.slot_rows(slot)
                delta = scale * (x @ a[at].T @ rows.b[at])
                if router is not None:
                    delta = delta * (x @ router.weight.T).softmax(-1)[..., slot : slot + 1]
                y = y + delta
            return y

        hooks.append(linear.base_layer.register_forward_hook(formula))
    handle.use(None)
    found = logits(handle)
    for hook in hooks:
        hook.remove()
    handle.use("gated")
    return found


KINDS = {
    "equal-ranks": {"ranks": (3, 3, 3)},
    "uneven-ranks": {"ranks": (2, 0, 4)},
    "single-ranks": {"ranks": (1,) * 6},
    "tied": {"ranks": (3, 3, 3), "tied": True},
    "gated-rows": {"ranks": (2, 3), "factor": True},
    "gated-rows-no-router": {"ranks": (2, 3), "factor": True, "routed": False},
    "tied-no-router": {"ranks": (2, 2), "tied": True, "routed": False},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_with_its_own_router_computes_the_formula(kind, backend):
    handle = attached(Gated(**KINDS[kind]), backend)
    want = by_hand(handle).detach()
    torch.testing.assert_close(logits(handle), want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # few rows: pairs for the kernel where it can run
        torch.testing.assert_close(logits(handle), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_formula(kind):
    handle = attached(Gated(**KINDS[kind]))
    parameters = handle.trainable_parameters("gated")
    found = torch.autograd.grad(logits(handle).square().mean(), list(parameters.values()))
    want = torch.autograd.grad(by_hand(handle).square().mean(), list(parameters.values()))
    for name, f, w in zip(parameters, found, want, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=2e-6 * float(w.abs().max()), msg=name)


def test_a_route_by_slot_and_a_dense_one_agree():
    torch.testing.assert_close(
        logits(attached(Gated())), logits(attached(Gated(sparse=True))), rtol=1e-5, atol=1e-6
    )


def test_neighbours_with_other_adapters_do_not_matter():
    handle = attached(Gated((2, 2)))
    handle.put(adapter(handle, Gated((3, 1), tied=False), "other", seed=1))
    handle.add(loramux.MixLoRAConfig(r=2, num_experts=4), name="rows")
    want = {}
    for name in ("gated", "other", "rows", None):
        handle.use(name)
        want[name] = logits(handle, IDS[:1])
    names = ["other", "gated", None, "rows", "gated"]
    with handle.batch(adapters=names):
        found = logits(handle, IDS[:1].expand(5, -1))
    for name, row in zip(names, found, strict=True):
        torch.testing.assert_close(row, want[name][0], rtol=1e-5, atol=1e-5)


def test_checkpointed_layers_route_alike():
    handle = attached(Gated((3, 3), factor=True))
    parameters = list(handle.trainable_parameters("gated").values())
    want = torch.autograd.grad(logits(handle).square().mean(), parameters)
    handle.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    handle.model.train()
    found = torch.autograd.grad(logits(handle).square().mean(), parameters)
    for f, w in zip(found, want, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-7)


def test_folded_rows_follow_the_parameters():
    handle = attached(Gated((2, 3), factor=True, routed=False), "auto")
    rows = next(iter(handle.adapters["gated"].rows.values()))
    with torch.no_grad():
        before = logits(handle)
        first = rows.folded()
        assert rows.folded() is first
        rows.gate.value.mul_(3.0)
        assert not torch.equal(logits(handle), before)
        torch.testing.assert_close(rows.folded().a, rows.a * rows.gate.value.unsqueeze(1))
    torch.testing.assert_close(logits(handle), by_hand(handle), rtol=1e-5, atol=1e-5)


def test_a_masked_rank_counts_as_a_row_of_zeros_request_by_request():
    handle = attached(Gated((2, 3), routed=False))
    path = "model.layers.0.mlp.up_proj"
    mask = torch.ones(2, 5)
    mask[1, 3] = 0.0
    with torch.no_grad(), handle.masking({path: mask}):
        found = logits(handle)
    with torch.no_grad():
        torch.testing.assert_close(found[0], logits(handle)[0], rtol=1e-6, atol=1e-6)
        handle.adapters["gated"].rows[path].b[3] = 0.0
        torch.testing.assert_close(found[1], logits(handle)[1], rtol=1e-6, atol=1e-6)


def test_a_mask_that_does_not_fit_is_refused():
    handle = attached(Gated((2, 3)))
    with (
        pytest.raises(ValueError, match=r"cannot be masked at .* \[requests, rank rows\]"),
        handle.masking({"model.layers.0.mlp.up_proj": torch.ones(2, 4)}),
    ):
        pass


def test_routers_learn_the_task_of_every_request():
    handle = attached(Gated())
    with handle.batch(tasks=["snips", None]):
        logits(handle)
    handle.model(IDS, tasks=["a", "b"])
    logits(handle)
    router = next(iter(handle.adapters["gated"].routers.values()))
    assert router.tasks == [("snips", None), ("a", "b"), None]
    with pytest.raises(ValueError, match="holds 2 requests, but 3 tasks"):
        handle.model(IDS, tasks=["a", "b", "c"])


def test_experts_that_share_an_a_need_one_rank_and_no_dora():
    site = Site("l.0.x", "x", 0, "l.0", "l.0", "other", "plain", 6, 5, 6)
    with pytest.raises(ValueError, match="need one rank"):
        fresh_rows(site, [Expert(2, 1.0), Expert(3, 1.0)], tied=2).to("cpu")
    with pytest.raises(ValueError, match="DoRA"):
        fresh_rows(site, [Expert(2, 1.0)] * 2, tied=2, magnitude_O=torch.ones(5))


def test_a_dora_gain_is_worked_out_once_and_follows_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[int] = []
    monkeypatch.setattr(bank, "dora_gain", lambda *args: calls.append(1) or dora_gain(*args))
    handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=3, use_dora=True))
    rows = handle.adapters["default"].rows
    for parameters in rows.values():
        torch.nn.init.normal_(parameters.b)
    with torch.no_grad():
        trained = logits(handle)
        logits(handle)
    assert len(calls) == 2 * len(rows)  # under training every time
    handle.adapters["default"].set_trainable(False)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(logits(handle), trained)
        logits(handle)
        assert len(calls) == len(rows)
        first = next(iter(rows.values()))
        first.magnitude.mul_(1.5)
        changed = logits(handle)
    assert len(calls) == len(rows) + 1
    assert not torch.allclose(changed, trained)
