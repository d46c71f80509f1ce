"""Lowering: a static adapter bit for bit, a mixture for one prompt or task exactly, everything else not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loramux
from compose.samples import IDS, peft_logits, save_lora
from formats.samples import same_tensors
from loramux import lower_adapter
from loramux.errors import LoramuxError
from loramux.eval.loading import Loaded
from loramux.formats.peft import read_peft
from loramux.formats.tensors import named_tensors
from pico import build_pico

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
PROMPT = "to be or not"
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a mixture with random rows and routers over a fresh pico."""

    def run(config: Any, family: str = "llama", name: str = "mix") -> Path:
        model = build_pico(family)
        handle = loramux.attach(model, config)
        made = torch.Generator().manual_seed(4)
        (adapter,) = handle.adapters.values()
        with torch.no_grad():
            for key, parameter in adapter.named_parameters():
                if parameter.requires_grad and "magnitude" not in key:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=made))
        handle.save(tmp_path / name)
        return tmp_path / name

    return run


@torch.no_grad()
def mixture_logits(
    family: str, folder: Path, prompt: list[int], answer: list[int], task: str | None = None
) -> Tensor:
    """Our logits of prompt and answer, the routers reading the prompt only."""
    model = build_pico(family)
    handle = loramux.load(model, folder)
    ids = torch.tensor([prompt + answer])
    mask = torch.arange(ids.shape[1]).unsqueeze(0) < len(prompt)
    tasks = None if task is None else [task]
    with handle.batch(prompt_mask=mask, tasks=tasks):
        found: Tensor = model(input_ids=ids).logits
    return found


@torch.no_grad()
def lowered_logits(family: str, folder: Path, ids: list[int]) -> Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(build_pico(family), str(folder)).eval()
    found: Tensor = model(input_ids=torch.tensor([ids])).logits
    return found


ANSWER = [12, 60, 33]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("gate", ["ste", "prob"])
def test_a_milora_lowered_for_a_prompt_computes_the_same_in_peft(
    gate: Any, family: str, save: Save, tmp_path: Path, tokenizer
):
    folder = save(loramux.MiLoRAConfig(r=3, top_k=2, gate=gate), family)
    base = Loaded(build_pico(family), tokenizer, None)
    made = lower_adapter(folder, tmp_path / "plain", base=base, prompt=PROMPT)
    prompt = tokenizer(PROMPT)["input_ids"]
    wanted = mixture_logits(family, folder, prompt, ANSWER)
    torch.testing.assert_close(
        lowered_logits(family, tmp_path / "plain", prompt + ANSWER), wanted, **CLOSE
    )
    assert made["servability"] == "per_request" and made["sites"] == 2 * 2  # top_k in each layer
    assert not hasattr(base.model, "loramux")
    other = mixture_logits(family, folder, list(reversed(prompt)) * 2, ANSWER)
    assert (other[:, -3:] - wanted[:, -3:]).abs().max() > 1e-3


def test_another_prompt_lowers_to_another_adapter(save: Save, tmp_path: Path, tokenizer):
    folder = save(loramux.MiLoRAConfig(r=3, top_k=1))
    chosen = set()
    for number, prompt in enumerate(("zzz zz zzzzz", "a", "What time is it?", "9+1=")):
        base = Loaded(build_pico("llama"), tokenizer, None)
        lower_adapter(folder, tmp_path / f"{number}", base=base, prompt=prompt)
        chosen.add(tuple(read_peft(tmp_path / f"{number}").sites))
    assert len(chosen) > 1


def test_a_template_is_put_around_the_prompt(save: Save, tmp_path: Path, tokenizer):
    folder = save(loramux.MiLoRAConfig(r=3, top_k=2))
    base = Loaded(build_pico("llama"), tokenizer, None)
    lower_adapter(folder, tmp_path / "plain", base=base, prompt="be?", template="task")
    prompt = tokenizer("Question: be?\nAnswer:")["input_ids"]
    wanted = mixture_logits("llama", folder, prompt, [])
    torch.testing.assert_close(lowered_logits("llama", tmp_path / "plain", prompt), wanted, **CLOSE)


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_a_mole_whose_gates_pool_the_prompt_computes_the_same_in_peft(
    granularity: Any, save: Save, tmp_path: Path, tokenizer
):
    model = build_pico("llama")
    experts = [
        save_lora(model, tmp_path / "red", rank=2, seed=1),
        save_lora(model, tmp_path / "blue", rank=5, seed=2, targets=("q_proj", "down_proj")),
    ]
    config = loramux.MoLEConfig(
        adapters=tuple(map(str, experts)), pool="prompt_mean", granularity=granularity
    )
    folder = save(config)
    base = Loaded(build_pico("llama"), tokenizer, None)
    lower_adapter(folder, tmp_path / "plain", base=base, prompt=PROMPT)
    prompt = tokenizer(PROMPT)["input_ids"]
    wanted = mixture_logits("llama", folder, prompt, ANSWER)
    torch.testing.assert_close(
        lowered_logits("llama", tmp_path / "plain", prompt + ANSWER), wanted, **CLOSE
    )
    ranks = {path: site.rank for path, site in read_peft(tmp_path / "plain").sites.items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2 + 5
    assert ranks["model.layers.0.self_attn.k_proj"] == 2


def test_a_moelora_is_lowered_for_a_task_without_any_prompt(save: Save, tmp_path: Path, tokenizer):
    folder = save(loramux.MOELoRAConfig(r=8, num_experts=4, tasks=("weather", "music")))
    base = Loaded(build_pico("llama"), tokenizer, None)
    found = {}
    for task in ("weather", "music"):
        lower_adapter(folder, tmp_path / task, base=base, task=task)
        found[task] = lowered_logits("llama", tmp_path / task, IDS[0].tolist())
        wanted = mixture_logits("llama", folder, IDS[0].tolist(), [], task)
        torch.testing.assert_close(found[task], wanted, **CLOSE)
    assert (found["weather"] - found["music"]).abs().max() > 1e-3
    with pytest.raises(LoramuxError, match="depends on a task"):
        lower_adapter(folder, tmp_path / "none", base=base)
    with pytest.raises(ValueError, match="'sport'"):
        lower_adapter(folder, tmp_path / "none", base=base, task="sport")
    assert not hasattr(base.model, "loramux")


def test_a_midora_is_lowered_to_a_dora(save: Save, tmp_path: Path, tokenizer):
    folder = save(loramux.MiDoRAConfig(r=3, top_k=2))
    base = Loaded(build_pico("llama"), tokenizer, None)
    lower_adapter(folder, tmp_path / "plain", base=base, prompt=PROMPT)
    assert read_peft(tmp_path / "plain").config["use_dora"] is True
    prompt = tokenizer(PROMPT)["input_ids"]
    wanted = mixture_logits("llama", folder, prompt, ANSWER)
    torch.testing.assert_close(
        lowered_logits("llama", tmp_path / "plain", prompt + ANSWER), wanted, **CLOSE
    )


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_static_adapter_is_exported_bit_for_bit(config: dict, tmp_path: Path):
    model = build_pico("llama")
    folder = save_lora(model, tmp_path / "static", seed=3, **config)
    made = lower_adapter(folder, tmp_path / "plain")
    one, two = read_peft(folder), read_peft(tmp_path / "plain")
    assert one.config == two.config and made["digest"] == one.digest == two.digest
    assert same_tensors(named_tensors(one.sites), named_tensors(two.sites))
    assert torch.equal(peft_logits(model, folder), peft_logits(model, tmp_path / "plain"))
    with pytest.raises(ValueError, match="was trained on another base"):
        loramux.load(build_pico("llama", seed=1), tmp_path / "plain")


@pytest.mark.parametrize("name", ["mixlora", "smora", "mola", "hydralora"])
def test_what_routes_tokens_is_refused_with_the_reason(
    name: str, save: Save, tmp_path: Path, tokenizer
):
    settings = {"name": name, "r": 8}
    folder = save(loramux.config_from_dict(settings))
    base = Loaded(build_pico("llama"), tokenizer, None)
    with pytest.raises(LoramuxError, match="routes every token anew: no fixed weights do the same"):
        lower_adapter(folder, tmp_path / "plain", base=base, prompt=PROMPT)
    assert not (tmp_path / "plain").exists()
    assert not hasattr(base.model, "loramux")


def test_what_is_missing_or_too_much_is_said(save: Save, tmp_path: Path, tokenizer):
    static = save_lora(build_pico("llama"), tmp_path / "static")
    mixture = save(loramux.MiLoRAConfig(r=2, top_k=1))
    base = Loaded(build_pico("llama"), tokenizer, None)
    out = tmp_path / "plain"
    for arguments, message in (
        ({"adapter": static, "prompt": "x"}, "is static: it does the same for every prompt"),
        ({"adapter": static, "to": "gguf"}, "cannot lower to 'gguf'; allowed: peft"),
        ({"adapter": tmp_path / "none"}, "no adapter folder at"),
        ({"adapter": mixture, "prompt": "x"}, "its routers run on the base; give --base"),
        ({"adapter": mixture, "base": base}, "depends on a prompt; give --prompt TEXT"),
    ):
        with pytest.raises(LoramuxError, match=message):
            lower_adapter(**arguments, out=out)  # type: ignore[arg-type]
    with pytest.raises(LoramuxError, match="is the adapter .* that is read"):
        lower_adapter(static, static, force=True)
    wrong = Loaded(build_pico("llama", seed=1), tokenizer, None)
    with pytest.raises(ValueError, match="this mixture was trained on"):
        lower_adapter(mixture, out, base=wrong, prompt="x")
    assert not out.exists()
    lower_adapter(mixture, out, base=wrong, prompt="x", check_base=False)


def test_where_it_came_from_is_noted(save: Save, tmp_path: Path, tokenizer):
    folder = save(loramux.MiLoRAConfig(r=2, top_k=1))
    base = Loaded(build_pico("llama"), tokenizer, None)
    lower_adapter(folder, tmp_path / "plain", base=base, prompt=PROMPT)
    noted = json.loads((tmp_path / "plain" / "lower.json").read_text())
    assert (noted["method"], noted["prompt"], noted["servability"]) == (
        "milora",
        PROMPT,
        "per_request",
    )
    with pytest.raises(ValueError, match="was trained on another base"):
        loramux.load(build_pico("llama", seed=1), tmp_path / "plain")


def test_the_weights_of_slots_add_up_over_repeated_choices():
    """A route that names a slot twice, or none with -1, weighs it as the kernel does."""
    from types import SimpleNamespace

    from loramux.compose.lower import slot_weights
    from loramux.core.types import Route

    spans = SimpleNamespace(num_slots=4)
    adapter: Any = SimpleNamespace(
        name="x",
        rows={"p": SimpleNamespace(spans=spans)},
        method=SimpleNamespace(unit_of=lambda site: None, title="X"),
    )
    site: Any = SimpleNamespace(path="p")

    def weights(route: Route) -> list[float]:
        state: Any = SimpleNamespace(route=lambda a, s: route)
        return slot_weights(state, adapter, site).tolist()

    slot, weight = torch.tensor([[2, 0, 2, -1]]), torch.tensor([[0.5, 0.25, 0.5, 9.0]])
    assert weights(Route(slot=slot, weight=weight, per_request=True)) == [0.25, 0, 1.0, 0]
    assert weights(Route(slot=slot, per_request=True)) == [1, 0, 2, 0]
    gate = torch.tensor([[0.0, 0.5]])
    assert weights(Route(gate=gate, column={"p": 1})) == [0.5] * 4
    with pytest.raises(LoramuxError, match="per token"):
        weights(Route(weight=torch.ones(3, 4)))
    with pytest.raises(LoramuxError, match="runs an FFN once per expert"):
        weights(Route(combine="rows"))
