"""The twelve test oracles of ALoRA's page, against the dense restatement and PEFT."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, LlamaConfig

import loramux
from loramux.core.ablation import Unit, ablation_scores, rank_units
from loramux.core.edits import Editor
from loramux.core.estimates import taylor_scores
from loramux.core.sites import find_sites
from loramux.core.types import Site
from loramux.methods.alora import ALoRAConfig, ALoRAMethod, share_out
from loramux.methods.lora import LoraConfig
from loramux.train import Trainer
from methods.alora_case import (
    RANK,
    SHORT,
    adapter_under,
    attached,
    base_of,
    batch_of,
    edits_of,
    logits_of,
    oracle_batch,
    planted,
    ranks,
    trainer,
)
from methods.bridge import adapter_of, close
from oracles import alora
from oracles.lora import LowRank, oracle_logits
from train.toys import examples

SPEARMAN = 0.9  # of the first-order estimate, after the short training below


def editor_of(handle: loramux.Handle) -> Editor:
    parameters = handle.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters.values())
    return Editor(adapter_of(handle), optimizer, dict(parameters), torch.Generator())


def test_oracle_1_before_any_round_it_is_pefts_lora() -> None:
    model, _, params = attached()
    batch = batch_of(examples(3))
    close(
        logits_of(model, batch), oracle_logits(base_of(), *oracle_batch(batch)[:2], params).detach()
    )
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    other = peft.get_peft_model(base_of(), config).eval()
    theirs = dict(other.named_parameters())
    for path, expert in params.items():
        where = f"base_model.model.{path}."
        theirs[where + "lora_A.default.weight"].data = expert.A.clone()
        theirs[where + "lora_B.default.weight"].data = expert.B.clone()
    close(logits_of(model, batch), logits_of(other, batch))


def test_oracle_2_a_gate_at_zero_is_the_rank_removed() -> None:
    model, handle, params = attached()
    batch = batch_of(examples(3))
    path = "model.layers.0.mlp.up_proj"
    mask = torch.ones(3, RANK)
    mask[:, 1] = 0
    with handle.masking({path: mask}):
        gated = logits_of(model, batch)
    dense = alora.with_gates(params, alora.without(params, (path, 1)))
    close(gated, oracle_logits(base_of(), *oracle_batch(batch)[:2], dense).detach())
    editor_of(handle).gather(path, 0, [0, 2])
    close(logits_of(model, batch), gated, 1e-6)


def test_oracle_3_a_rank_whose_b_is_zero_scores_the_base() -> None:
    _, handle, _ = attached()
    path = "model.layers.1.self_attn.v_proj"
    with torch.no_grad():
        adapter_of(handle).rows[path].b[2] = 0
    scores = ablation_scores(handle, batch_of(examples(3)), [Unit(path, (2,))])
    assert float(scores.without[0]) == scores.full
    assert float(scores.alone[0]) == scores.base
    assert float(scores.importance[0]) == scores.base


@pytest.mark.parametrize("score", [ablation_scores, taylor_scores])
def test_oracle_4_the_rank_that_carries_the_task_scores_highest_and_harm_below_nothing(
    score: object,
) -> None:
    key, bad = ("model.layers.1.mlp.down_proj", 1), ("model.layers.0.self_attn.o_proj", 0)
    handle, batch = planted({key: 4.0}, {bad: 3.0})
    units = rank_units(adapter_of(handle))
    scores = score(handle, batch, units)  # type: ignore[operator]
    best = units[int(scores.importance.argmax())]
    assert (best.path, best.rows[0]) == key
    if score is ablation_scores:
        worst = units.index(Unit(bad[0], (bad[1],)))
        assert float(scores.importance[worst]) < scores.base - 0.01


def test_oracle_5_a_round_prunes_n_ranks_and_keeps_the_budget() -> None:
    run = trainer(ALoRAConfig(**{**SHORT, "rounds": 3, "grace_rounds": 0}))
    run.run()
    edits = edits_of(run)
    rounds = [edit for edit in edits if edit["what"] == "round"]
    assert [edit["step"] for edit in rounds] == [3, 5, 7]
    for number, entry in enumerate(rounds):
        own = [edit for edit in edits if edit["round"] == number]
        pruned = [edit["site"] for edit in own if edit["what"] == "prune"]
        added = [edit["site"] for edit in own if edit["what"] == "add"]
        assert len(pruned) == len(added) == 5
        assert not set(pruned) & set(added)
        assert sum(entry["ranks"].values()) == RANK * 14
    assert ranks(adapter_under(run)) == rounds[-1]["ranks"]


def test_oracle_5_what_a_round_chooses_is_the_oracles_choice() -> None:
    run = trainer(ALoRAConfig(**{**SHORT, "rounds": 1, "score_rows": 8}), steps=4)
    kept: dict[str, LowRank] = {}

    def remember(controller: object, moment: object) -> None:
        rows = adapter_under(run).rows
        kept.update(
            {p: LowRank(r.a.detach().clone(), r.b.detach().T.clone(), 1.0) for p, r in rows.items()}
        )

    control = run.runners[0].control
    act = control.controller._reallocate  # type: ignore[union-attr]
    control.controller._reallocate = lambda m: (remember(control, m), act(m))[1]  # type: ignore
    run.run()
    rows = oracle_batch(batch_of(list(run.runners[0].job.validation)))
    naive = {k: a + b for k, (a, b) in alora.importance(base_of(), rows, kept).items()}
    expected = alora.one_round(naive, 5)
    edits = edits_of(run)
    assert [(e["site"], e["rank"]) for e in edits if e["what"] == "prune"] == expected.pruned
    added = [edit["site"] for edit in edits if edit["what"] == "add"]
    assert {site: added.count(site) for site in added} == expected.added
    for edit in edits:
        if edit["what"] == "prune":
            assert abs(edit["importance"] - naive[edit["site"], edit["rank"]]) < 1e-5


class Seen(NamedTuple):
    """The rows of every site at one moment, and the number and round of birth of each."""

    rows: dict[str, LowRank]
    ids: dict[str, list[int]]
    born: dict[str, list[int]]


def watched(**settings: Any) -> tuple[Trainer, list[tuple[Seen, Seen]]]:
    """A run that looks at the rows before and after every round."""
    run = trainer(ALoRAConfig(**{**SHORT, "score_rows": 8, **settings}))
    seen: list[tuple[Seen, Seen]] = []
    controller = run.runners[0].control.controller  # type: ignore[union-attr]
    act = controller._reallocate  # type: ignore[union-attr]

    def now() -> Seen:
        rows = adapter_under(run).rows
        copies = {
            p: LowRank(r.a.detach().clone(), r.b.detach().T.clone(), 1.0) for p, r in rows.items()
        }
        return Seen(copies, copy.deepcopy(controller.ids), copy.deepcopy(controller.born))  # type: ignore[union-attr]

    def looking(moment: Any) -> Any:
        before = now()
        edits = act(moment)
        seen.append((before, now()))
        return edits

    controller._reallocate = looking  # type: ignore[union-attr, method-assign]
    run.run()
    return run, seen


@pytest.mark.parametrize("grace", [0, 1])
def test_oracle_5_every_number_of_the_ledger_is_the_row_it_was(grace: int) -> None:
    _, rounds = watched(rounds=3, grace_rounds=grace)
    fresh = 0
    for number, (before, after) in enumerate(rounds):
        for path, ids in after.ids.items():
            assert len(after.rows[path].A) == len(ids) == len(after.born[path])
            for row, (name, born) in enumerate(zip(ids, after.born[path], strict=True)):
                if born == number:
                    assert name not in before.ids[path]
                    assert not after.rows[path].B[:, row].any()
                    fresh += 1
                    continue
                was = before.ids[path].index(name)
                assert before.born[path][was] == born
                assert torch.equal(after.rows[path].A[row], before.rows[path].A[was])
                assert torch.equal(after.rows[path].B[:, row], before.rows[path].B[:, was])
    assert fresh == 3 * 5


def test_oracle_5_a_second_round_is_the_oracles_too() -> None:
    run, rounds = watched(grace_rounds=0)
    batch = oracle_batch(batch_of(list(run.runners[0].job.validation)))
    for number, (before, _) in enumerate(rounds):
        found = alora.importance(base_of(), batch, before.rows)
        naive = {(p, before.ids[p][row]): a + b for (p, row), (a, b) in found.items()}
        expected = alora.one_round(naive, 5)
        own = [edit for edit in edits_of(run) if edit["round"] == number]
        assert [(e["site"], e["rank"]) for e in own if e["what"] == "prune"] == expected.pruned
        added = [edit["site"] for edit in own if edit["what"] == "add"]
        assert {site: added.count(site) for site in added} == expected.added
    assert len(rounds) == 2


def test_oracle_5_without_an_unhurt_linear_nothing_is_added() -> None:
    run = trainer(ALoRAConfig(**{**SHORT, "rounds": 1, "ranks_per_round": 41}))
    run.run()
    assert sum(ranks(adapter_under(run)).values()) == 1
    assert not [edit for edit in edits_of(run) if edit["what"] == "add"]


def test_oracle_6_new_ranks_are_shared_out_evenly_with_the_rest_to_the_first() -> None:
    assert share_out(8, ["m1", "m2", "m3"]) == {"m1": 3, "m2": 3, "m3": 2}
    for count in range(1, 20):
        for num in range(1, 9):
            shares = share_out(count, [str(i) for i in range(num)])
            full = [shares.get(str(i), 0) for i in range(num)]
            assert sum(full) == count
            assert max(full) - min(full) <= 1
            assert full == sorted(full, reverse=True)


def test_oracle_7_adding_ranks_leaves_the_logits_alone() -> None:
    model, handle, _ = attached()
    batch = batch_of(examples(3))
    before = logits_of(model, batch)
    for path in adapter_of(handle).rows:
        editor_of(handle).gather(path, 0, [0, 1, 2, -1, -1])
    close(logits_of(model, batch), before, 1e-6)
    assert set(ranks(adapter_of(handle)).values()) == {5}


def test_oracle_8_scoring_in_training_changes_no_bit_of_it() -> None:
    """A round that can move nothing (everything at min_rank) against no round at all."""
    plain = trainer(ALoRAConfig(**{**SHORT, "rounds": 0}))
    scored = trainer(ALoRAConfig(**{**SHORT, "min_rank": RANK}))
    results = [run.run()[0] for run in (plain, scored)]
    assert len(edits_of(scored)) == 2
    assert results[0].val_loss == results[1].val_loss
    for (_, one), (_, two) in zip(
        *(adapter_under(run).trainable().items() for run in (plain, scored)), strict=True
    ):
        assert torch.equal(one, two)


def test_oracle_9_taylor_orders_ranks_of_a_trained_model_as_the_exact_score_does() -> None:
    """Prefix reuse and batched gates against the naive loop: see tests/core/test_ablation.py."""
    run = trainer(ALoRAConfig(r=RANK, rounds=0), steps=40)
    run.run()
    units = rank_units(adapter_under(run))
    batch = batch_of(examples(32, seed=11))
    exact = ablation_scores(run.handle, batch, units).importance
    found = spearmanr(taylor_scores(run.handle, batch, units).importance, exact).statistic
    assert found > SPEARMAN, found


def test_oracle_10_no_rounds_is_plain_lora_bit_for_bit() -> None:
    runs = [
        trainer(config)
        for config in (
            ALoRAConfig(r=RANK, rounds=0),
            LoraConfig(r=RANK, lora_alpha=RANK),
        )
    ]
    results = [run.run()[0] for run in runs]
    assert results[0].train_loss == results[1].train_loss
    one, two = (adapter_under(run).trainable() for run in runs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_oracle_11_the_exported_adapter_and_its_merge_reproduce_the_logits(tmp_path: Path) -> None:
    run = trainer(ALoRAConfig(**SHORT))
    run.run()
    handle = run.handle
    found = set(ranks(adapter_under(run)).values())
    assert len(found) > 1, "ranks must differ for the patterns to matter"
    batch = batch_of(examples(5, seed=8))
    expected = logits_of(handle.model.eval(), batch)
    folder = handle.save(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(base_of(), str(folder)).eval()
    close(logits_of(other, batch), expected)
    close(logits_of(other.merge_and_unload(), batch), expected)


def test_oracle_11_a_linear_that_lost_all_ranks_is_no_target(tmp_path: Path) -> None:
    model, handle, _ = attached()
    gone = "model.layers.0.self_attn.k_proj"
    editor_of(handle).gather(gone, 0, [])
    editor_of(handle).gather("model.layers.1.self_attn.k_proj", 0, [1])
    batch = batch_of(examples(3))
    expected = logits_of(model, batch)
    folder = handle.save(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(base_of(), str(folder)).eval()
    assert not [name for name, _ in other.named_parameters() if gone in name and "lora" in name]
    close(logits_of(other, batch), expected)


def test_oracle_12_the_papers_parameter_counts() -> None:
    config = LlamaConfig(num_hidden_layers=32)  # the defaults are LLaMA-2-7B's shapes
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    method = ALoRAMethod(ALoRAConfig())
    sites = find_sites(model)

    def count(site: Site) -> int:
        return sum(expert.rank for expert in method.experts(site)) * (site.d_in + site.d_out)

    assert sum(map(count, sites)) == 19_988_480
    one_rank = {site.kind: site.d_in + site.d_out for site in sites}
    assert one_rank["ffn"] - one_rank["attention"] == 6_912
    assert method.config.num_moved(8 * 224, 7) == 7
