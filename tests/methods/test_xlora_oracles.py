"""The oracles of X-LoRA's specification, and PEFT's own outputs where the algorithm is the same."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loramux
from loramux.core import prepass
from loramux.methods.xlora import XLoraConfig
from methods.bridge import adapter_of, close
from methods.frozen_case import IDS, MASK, NAMES, REAL, Frozen, merged_logits
from methods.xlora_case import OPTIONS, classified, scalings_of
from oracles import xlora
from oracles.surgery import model_logits
from pico import WIDTH, build_pico


@pytest.mark.parametrize("layerwise", [False, True])
def test_scalings_sum_to_one_per_token_with_the_softmax_on(tmp_path: Path, layerwise: bool):
    made = classified(tmp_path, layerwise_scalings=layerwise)
    made.run()
    scale = scalings_of(made)
    torch.testing.assert_close(scale.sum(-1), torch.ones(2, 6).double())
    assert scale.std(1).max() > 0.01


def test_a_zero_classifier_is_the_uniform_mixture(tmp_path: Path):
    made = classified(tmp_path, std=0.0)
    close(made.run().detach()[REAL], merged_logits(made, [1 / 3] * 3)[REAL])


@pytest.mark.parametrize("number", range(3))
def test_one_hot_scalings_are_that_adapter(tmp_path: Path, number: int):
    made = classified(tmp_path, std=0.0)
    (router,) = made.routers.values()
    router.layers[-1].bias.data[number] = 200.0
    close(made.run().detach()[REAL], made.alone(number)[REAL])


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_the_scaling_pass_is_the_bare_base_bit_for_bit(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
):
    made = classified(tmp_path, family=family, double=False)
    seen = []
    (router,) = made.routers.values()
    router.register_forward_pre_hook(lambda m, args: seen.append(args[0].x_ND))
    with torch.no_grad():
        made.run()
        expected = xlora.hidden_state(made.base(), IDS, MASK)
    assert torch.equal(seen[0].view_as(expected), expected)


def test_a_saved_classifier_gives_identical_scalings_whatever_the_adapters_are_called(
    tmp_path: Path,
):
    """PEFT loses the layers of a classifier whose number is also the name of an adapter."""
    made = classified(tmp_path / "adapters", double=False, xlora_depth=3, xlora_size=8)
    folders = []
    for number, folder in enumerate(made.folders):
        folders.append(str(Path(folder).rename(tmp_path / str(number))))
    made.handle.detach()
    torch.manual_seed(0)
    config = XLoraConfig(adapters=tuple(folders), xlora_depth=3, xlora_size=8)
    made.handle = loramux.attach(made.model, config, backend="reference")
    assert adapter_of(made.handle).experts == ("0", "1", "2")
    expected, scale = made.run(), scalings_of(made)
    saved = made.handle.save(tmp_path / "mixture")
    assert len(load_file(saved / "router.safetensors")) == 6
    made.handle.detach()
    made.handle = loramux.load(made.model, saved, backend="reference")
    assert torch.equal(made.run(), expected)
    assert torch.equal(scalings_of(made), scale)


def test_a_file_without_a_layer_of_the_classifier_is_refused(tmp_path: Path):
    from conformance.test_loading import record_digests

    saved = classified(tmp_path / "a", double=False).handle.save(tmp_path / "mixture")
    tensors = load_file(saved / "router.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, saved / "router.safetensors", metadata={"format": "pt"})
    record_digests(saved)
    with pytest.raises(ValueError, match="lacks"):
        loramux.load(build_pico("llama"), saved)


def test_padding_changes_no_scaling_of_the_real_tokens(tmp_path: Path):
    made = classified(tmp_path, double=False)
    made.run()
    padded = scalings_of(made)
    made.run(IDS[1:, :4], None)
    close(scalings_of(made, 1)[0], padded[1, :4], 1e-5)


# -- PEFT ----------------------------------------------------------------------------------------


def in_peft(made: Frozen, options: dict[str, Any]) -> Any:
    """The same adapters and classifier in PEFT's X-LoRA, which wants adapters called 0, 1, ... and no KV cache."""
    base: Any = made.base()
    base.config.use_cache = False
    adapters = {str(number): folder for number, folder in enumerate(made.folders)}
    known = {"xlora_depth": 1, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(
            base,
            peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=WIDTH,
                adapters=adapters,
                xlora_dropout_p=0.0,
                **known,
            ),
        )
    (router,) = made.routers.values()
    classifier = theirs.base_model.internal_xlora_classifier
    classifier.layers.load_state_dict(
        {name.removeprefix("layers."): p.data for name, p in router.named_parameters()}
    )
    return theirs.eval()


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_logits_and_scalings_are_pefts(tmp_path: Path, kind: str):
    options, _ = OPTIONS[kind]
    made = classified(tmp_path, double=False, **options)
    theirs = in_peft(made, options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model_logits(theirs, IDS, MASK).detach()
    close(made.run().detach()[REAL], expected[REAL])
    if "top_k_lora" not in options:  # PEFT chooses later, inside its linears
        scale = theirs.base_model.internal_xlora_scalings.mean(2).detach()
        close(scalings_of(made)[REAL], scale[REAL])


@pytest.mark.parametrize("kind", ["plain", "layerwise"])
def test_generation_with_two_caches_has_pefts_tokens_without_one(tmp_path: Path, kind: str):
    options, _ = OPTIONS[kind]
    made = classified(tmp_path, double=False, **options)
    theirs = in_peft(made, options)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = IDS[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.generate(input_ids=prompt, **given)
    assert torch.equal(made.model.generate(prompt, use_cache=True, **given), expected)


def test_a_decode_step_runs_one_token_in_each_pass(tmp_path: Path):
    made = classified(tmp_path, double=False)
    widths: list[int] = []
    layer = made.model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    made.model.generate(IDS[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hook.remove()
    assert widths == [6, 6, 1, 1, 1, 1, 1, 1]


def test_the_names_of_adapters_are_free(tmp_path: Path):
    """PEFT fails in its forward unless they are called 0, 1, ..."""
    made = classified(tmp_path)
    assert adapter_of(made.handle).experts == NAMES[:3]
    assert made.run().isfinite().all()
    assert prepass.HiddenRouter in type(next(iter(made.routers.values()))).__mro__
