"""Shared oracle 8: LoRAMoE and MoLA in MoE-PEFT's layout keep the logits, both ways; what it cannot say is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loramux
from loramux.formats import FormatError
from methods.bridge import adapter_of, close
from methods.site_mixture_case import ALPHA, IDS, MASK, RANK, REAL, attached, run
from oracles import site_mixture
from oracles.lora import LowRank
from oracles.site_mixture import Mixture
from oracles.surgery import base_weight
from pico import build_pico

WEIGHTS = "adapter_model.safetensors"
KINDS = {"loramoe": site_mixture.soft, "mola": site_mixture.top_renormalised(2)}
LINEARS = {
    "loramoe": ("gate_proj", "up_proj", "down_proj"),
    "mola": ("q_proj", "o_proj", "gate_proj", "down_proj"),
}
EXPERTS = 3


def published(kind: str, folder: Path, *, attention: bool = False) -> dict[str, Mixture]:
    """A folder as that project's writer leaves it, once saved as safetensors; and the oracle's numbers."""
    model, draw = build_pico("llama"), torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    params = {}
    targets = (*LINEARS[kind], *(("v_proj",) if attention else ()))
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name not in targets:
            continue
        W, _ = base_weight(module)
        key = path.replace("model.", f"{kind}.", 1)
        plain = attention and name == "v_proj"
        num = 1 if plain else EXPERTS
        experts = []
        for e in range(num):
            a = 0.2 * torch.randn(RANK, W.shape[1], generator=draw)
            b = 0.2 * torch.randn(W.shape[0], RANK, generator=draw)
            own = key if plain else f"{key}.experts.{e}"
            tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
            experts.append(LowRank(a, b, ALPHA / RANK))
        gate = 0.5 * torch.randn(num, W.shape[1], generator=draw)
        if not plain:
            tensors[f"{key}.moe_gate.weight"] = gate
        params[path] = Mixture(experts, gate)  # of one expert the gate says 1, whatever it is
    config: dict[str, Any] = {
        "bias": "none",
        "peft_type": kind.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "./llama",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.05,
        "target_modules": list(targets),
        "use_dora": False,
        "use_rslora": False,
        "routing_strategy": kind,
        "num_experts": EXPERTS,
    }
    folder.mkdir(parents=True)
    config |= {"top_k": 2} if kind == "mola" else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return params


def logits_of(folder: Path) -> tuple[Tensor, loramux.Handle]:
    model = build_pico("llama")
    handle = loramux.load(model, folder, backend="reference")
    return run(model, handle, None).detach(), handle


@pytest.mark.parametrize(
    ("kind", "attention"), [("loramoe", False), ("loramoe", True), ("mola", False)]
)
def test_8_a_published_folder_loads_with_the_oracles_logits(
    kind: str, attention: bool, tmp_path: Path
):
    params = published(kind, tmp_path / "theirs", attention=attention)
    got, handle = logits_of(tmp_path / "theirs")
    base = build_pico("llama").requires_grad_(False)
    expected, _ = site_mixture.oracle_logits(base, IDS, MASK, params, KINDS[kind])
    close(got[REAL], expected[REAL])
    adapter = adapter_of(handle)
    assert adapter.method.name == kind
    plain = {path for path in adapter.rows if path not in adapter.routers}
    assert plain == ({p for p in params if "v_proj" in p} if attention else set())


@pytest.mark.parametrize(
    ("kind", "attention"), [("loramoe", False), ("loramoe", True), ("mola", False)]
)
def test_8_what_was_read_is_written_back_tensor_for_tensor(
    kind: str, attention: bool, tmp_path: Path
):
    published(kind, tmp_path / "theirs", attention=attention)
    _, handle = logits_of(tmp_path / "theirs")
    handle.save(tmp_path / "again", layout="moe-peft")
    theirs, again = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "again"))
    assert theirs.keys() == again.keys()
    assert all(torch.equal(theirs[name], again[name]) for name in theirs)
    one, two = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("theirs", "again")
    )
    for key in ("peft_type", "r", "lora_alpha", "lora_dropout", "num_experts", "routing_strategy"):
        assert one[key] == two[key]
    assert sorted(one["target_modules"]) == two["target_modules"]


@pytest.mark.parametrize(
    ("kind", "settings"), [("loramoe", {}), ("mola", {"experts_per_layer": (3,)})]
)
def test_8_an_adapter_of_ours_keeps_its_logits_in_both_layouts(
    kind: str, settings: dict[str, Any], tmp_path: Path
):
    model, handle = attached(kind, **settings)
    expected = run(model, handle, None)
    for layout in ("own", "moe-peft"):
        got, _ = logits_of(handle.save(tmp_path / layout, layout=layout))
        assert torch.equal(got, expected)


def test_what_the_layout_cannot_say_is_refused(tmp_path: Path):
    _, handle = attached("mola")
    with pytest.raises(FormatError, match="cannot say that linears differ"):
        handle.save(tmp_path / "uneven", layout="moe-peft")
    _, handle = attached("molora")
    with pytest.raises(ValueError, match="the layout is for LoRAMoE and MoLA"):
        handle.save(tmp_path / "molora", layout="moe-peft")
    assert not (tmp_path / "uneven").exists()


def test_attention_may_hold_plain_loras_beside_the_experts_of_the_ffn(tmp_path: Path):
    model, handle = attached("loramoe", attention_lora=True, target_modules=("v_proj", "up_proj"))
    adapter = adapter_of(handle)
    assert {path.split(".")[-1] for path in adapter.routers} == {"up_proj"}
    slots = {path.split(".")[-1]: rows.spans.num_slots for path, rows in adapter.rows.items()}
    assert slots == {"v_proj": 1, "up_proj": 4}
    got, _ = logits_of(handle.save(tmp_path / "own"))
    assert torch.equal(got, run(model, handle, None))


EditConfig = Callable[[dict[str, Any]], Any]
EditTensors = Callable[[dict[str, Tensor]], Any]
ONE = "mola.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(use_dora=True), "use_dora is True, only False"),
        (lambda c: c.update(bias="all"), "bias is 'all', only 'none'"),
        (lambda c: c.update(r=RANK + 1), "another rank than r=5"),
        (lambda c: c.update(num_experts=4), "has 3 experts and a gate, num_experts is 4"),
        (lambda c: c.update(top_k=4), "top_k is 4"),
        (lambda c: c.update(routing_strategy="loramoe"), "peft_type is 'MOLA', but routing_strat"),
        (lambda c: c.update(routing_strategy=7), "routing_strategy 7; expected 'mola'"),
        (lambda c: c.update(lora_alpha=-1), "lora_alpha is -1"),
        (lambda c: c.update(top_kk=2), "did you mean 'top_kk' -> 'top_k'"),
        (lambda c: c.pop("r"), "lacks"),
        (lambda c: c["target_modules"].append("k_proj"), "disagree about .*k_proj"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(edit: EditConfig, message: str, tmp_path: Path):
    published("mola", tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        logits_of(tmp_path / "theirs")


@pytest.mark.parametrize(("top_k", "loads"), [(2, True), (0, False), (9, False), ("x", False)])
def test_a_top_k_that_loramoe_does_not_need_must_make_sense(
    top_k: object, loads: bool, tmp_path: Path
):
    published("loramoe", tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"top_k": top_k}))
    if loads:
        logits_of(tmp_path / "theirs")
    else:
        with pytest.raises(FormatError, match="top_k is"):
            logits_of(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{ONE}.moe_gate.weight"), "3 experts and no gate"),
        (lambda t: t.pop(f"{ONE}.experts.1.lora_B.weight"), "lacks lora_A or lora_B"),
        (lambda t: t.update({"mola.classifier": torch.ones(2)}), "unexpected tensors"),
        (lambda t: t.update({f"{ONE}.moe_gate.weight": torch.ones(3, 5)}), r"gate of .* \(3, 5\)"),
        (lambda t: t.update({f"{ONE}.lora_A.weight": torch.ones(4, 32)}), "unexpected tensors"),
        (lambda t: [t[n].zero_() for n in t if "lora_B" in n], "every B"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(edit: EditTensors, message: str, tmp_path: Path):
    published("mola", tmp_path / "theirs")
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    edit(tensors)
    save_file(tensors, tmp_path / "theirs" / WEIGHTS)
    with pytest.raises(FormatError, match=message):
        logits_of(tmp_path / "theirs")


def test_pickled_weights_are_refused(tmp_path: Path):
    published("mola", tmp_path / "theirs")
    (tmp_path / "theirs" / WEIGHTS).rename(tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(FormatError, match="safetensors"):
        logits_of(tmp_path / "theirs")
