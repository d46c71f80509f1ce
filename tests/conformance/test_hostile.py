"""What careless or hostile callers do: each either works, or is refused with ValueError and the model untouched."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, T5Config, T5ForConditionalGeneration

import loramux
from conformance.cases import IDS, LABELS, MASK, Maker, logits_of, nudge, trace, variants_of
from pico import build_pico

LORA = variants_of("lora")[0]
MILORA = variants_of("milora")[0]
SMALL = loramux.LoraConfig(r=4)
PROMPTS = torch.tensor([[5, 17, 40, 61], [90, 33, 12, 7], [8, 29, 44, 12], [70, 52, 9, 20]])
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def generated(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def two_adapters(make: Maker) -> loramux.Handle:
    return make.attach_all(build_pico("llama"), [LORA, MILORA])


# -- batches around generate -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "names"),
    [
        (4, [LORA.name, MILORA.name]),
        (2, [LORA.name]),
        (2, []),
        (1, [LORA.name, None]),
    ],
)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_with_another_number_of_adapters_than_prompts_is_refused(
    make: Maker, num: int, names: Sequence[str | None], num_beams: int
):
    handle = two_adapters(make)
    expected = generated(handle.model, PROMPTS)
    with pytest.raises(ValueError, match="adapter"), handle.batch(adapters=names):
        generated(handle.model, PROMPTS[:num], num_beams=num_beams)
    assert torch.equal(generated(handle.model, PROMPTS), expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}],
)
def test_generate_with_one_adapter_per_prompt_works_with_beams(
    make: Maker, options: dict[str, Any]
):
    handle = two_adapters(make)
    names = [MILORA.name, None]
    with handle.batch(adapters=names):
        together = generated(handle.model, PROMPTS[:2], **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        with handle.batch(adapters=[name]):
            alone = generated(handle.model, PROMPTS[row : row + 1], **options)
        assert torch.equal(together[each * row : each * (row + 1)], alone)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5), (1, 4), (4, 4)])
def test_generate_with_a_prompt_mask_of_another_shape_is_refused(
    make: Maker, shape: tuple[int, int]
):
    model = build_pico("llama")
    handle = make.attach(model, MILORA)
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="prompt_mask"), handle.batch(prompt_mask=mask):
        generated(model, PROMPTS[:2])
    assert generated(model, PROMPTS[:2]).shape == (2, 7)


def test_an_adapter_that_an_open_batch_names_cannot_silently_become_the_base(make: Maker):
    handle = two_adapters(make)
    names = [MILORA.name, LORA.name]
    with handle.batch(adapters=names), pytest.raises(ValueError, match="remove"):  # noqa: PT012
        handle.remove(MILORA.name)  # refused here, or the next call is
        logits_of(handle.model)
    logits_of(handle.model)


@pytest.mark.parametrize("name", ["milora-ste", None])
def test_use_inside_generate_is_refused(make: Maker, name: str | None):
    handle = two_adapters(make)
    expected = generated(handle.model, PROMPTS)

    class Switch(StoppingCriteria):
        def __call__(self, *_: object, **__: object) -> Any:
            handle.use(name)

    with pytest.raises(ValueError, match="use"):
        generated(handle.model, PROMPTS, stopping_criteria=[Switch()])
    assert torch.equal(generated(handle.model, PROMPTS), expected)


# -- names -----------------------------------------------------------------------------------------


def test_names_that_differ_in_a_dot_or_a_slash_do_not_collide(make: Maker):
    model = build_pico("llama")
    handle = make.attach(model, LORA)
    handle.add(SMALL, name="a.b")
    nudge(handle.adapters["a.b"], 1)
    handle.use("a.b")
    before = logits_of(model)
    try:
        handle.add(SMALL, name="a/b")
    except ValueError as error:
        assert "a/b" in str(error)  # noqa: PT017  (either outcome is allowed)
        assert list(handle.adapters) == ["default", "a.b"]
    else:
        nudge(handle.adapters["a/b"], 2)
        handle.use("a/b")
        assert not torch.equal(logits_of(model), before)
        handle.remove("a/b")
    handle.use("a.b")
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    "name",
    ["train", "keys", "values", "half", "type", "pop", "handle", "items", "forward", "training"],
)
def test_a_name_that_modules_use_for_themselves_works_or_leaves_the_model_untouched(name: str):
    model = build_pico("llama")
    before, expected = trace(model), logits_of(model)
    try:
        handle = loramux.attach(model, SMALL, name=name)
    except ValueError:
        assert trace(model) == before
        return
    nudge(handle.adapters[name])
    model.train()
    model.eval()
    model.float()
    assert not torch.equal(logits_of(model), expected)
    assert handle.trainable_parameters(name)
    handle.detach()
    assert trace(model) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a\nb", "x" * 300])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str):
    model = build_pico("llama")
    before = trace(model)
    with pytest.raises(ValueError, match="name"):
        loramux.attach(model, SMALL, name=name)
    assert trace(model) == before
    handle = loramux.attach(model, SMALL)
    with pytest.raises(ValueError, match="name"):
        handle.add(SMALL, name=name)
    assert list(handle.adapters) == ["default"]


# -- models that are not bare decoders -------------------------------------------------------------


def test_a_model_whose_body_is_attached_already_is_refused():
    model = build_pico("llama")
    handle = loramux.attach(model.model, SMALL)
    before = trace(model)
    with pytest.raises(ValueError, match="attached"):
        loramux.attach(model, SMALL)
    assert trace(model) == before
    handle.detach()
    loramux.attach(model, SMALL)


def test_the_body_of_a_model_that_is_attached_is_refused():
    model = build_pico("llama")
    loramux.attach(model, SMALL)
    before = trace(model)
    with pytest.raises(ValueError, match="attached"):
        loramux.attach(model.model, SMALL)
    assert trace(model) == before


@pytest.mark.parametrize("inner", [False, True])
def test_a_model_that_peft_has_wrapped_is_refused_with_the_way_out(inner: bool):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            build_pico("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])
        )
    target = wrapped.base_model.model if inner else wrapped
    before = trace(target)
    with pytest.raises(ValueError, match="merge_and_unload"):
        loramux.attach(target, SMALL)
    assert trace(target) == before
    loramux.attach(wrapped.merge_and_unload(), SMALL)


def test_an_encoder_decoder_model_is_refused():
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    before = trace(model)
    with pytest.raises(ValueError, match="encoder-decoder"):
        loramux.attach(model, SMALL)
    assert trace(model) == before


# -- number types ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [torch.float16, torch.float64])
@pytest.mark.parametrize("variant", variants_of("lora", "milora", "mixlora"), ids=lambda v: v.name)
def test_rows_of_another_float_type_run_and_equal_the_reference(
    make: Maker, variant: Any, rows: torch.dtype, base: torch.dtype
):
    model = build_pico("llama", dtype=base)
    handle = make.attach(model, variant, backend="auto")
    adapter = handle.adapters["default"]
    for own in adapter.rows.values():
        own.to(rows)
    found = logits_of(model)
    tokens = generated(model, PROMPTS)
    other = build_pico("llama", dtype=base)
    reference = make.attach(other, variant, backend="reference").adapters["default"]
    for path, own in reference.rows.items():
        own.load_state_dict(adapter.rows[path].state_dict())
    expected = logits_of(other)
    assert found.dtype == base and found.isfinite().all()
    loose = 5e-2 if base == torch.bfloat16 else 5e-3
    torch.testing.assert_close(found, expected, atol=loose, rtol=loose)
    assert tokens.shape == (4, 7)


# -- modes and life cycle --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [LORA, MILORA], ids=lambda v: v.name)
def test_dropout_ends_with_eval_even_for_a_decode_that_began_in_training_mode(
    make: Maker, variant: Any
):
    model = build_pico("llama")
    make.attach(model, variant, lora_dropout=0.5)
    answer = torch.tensor([[7, 9]])
    with torch.no_grad():
        model.train()
        cache = model(PROMPTS[:1], use_cache=True).past_key_values
        model(answer[:, :1], past_key_values=cache, use_cache=True)
        model.eval()
        answers = []
        for _ in range(3):
            answers.append(model(answer[:, 1:2], past_key_values=cache, use_cache=True).logits)
            cache.crop(-1)
    assert all(torch.equal(answers[0], other) for other in answers[1:])


def test_a_detached_handle_refuses_work_and_detaches_again_in_peace(make: Maker, tmp_path: Path):
    model = build_pico("llama")
    before, expected = trace(model), logits_of(model)
    handle = make.attach(model, LORA)
    folder = handle.save(tmp_path / "kept")
    handle.detach()
    calls = {
        "add": lambda: handle.add(SMALL),
        "load": lambda: handle.load(folder),
        "save": lambda: handle.save(tmp_path / "late"),
        "use": lambda: handle.use(None),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="detach"):
            call()
        assert trace(model) == before, name
    handle.detach()
    assert trace(model) == before
    assert torch.equal(logits_of(model), expected)
    assert not (tmp_path / "late").exists()


def test_a_handle_that_was_detached_does_not_touch_the_next_one(make: Maker):
    model = build_pico("llama")
    old = make.attach(model, LORA)
    old.detach()
    make.attach(model, MILORA)
    expected = logits_of(model)
    old.detach()
    assert torch.equal(logits_of(model), expected)


def test_plain_tuples_carry_the_cache_and_its_routes_too(make: Maker):
    model = build_pico("llama")
    make.attach(model, MILORA)
    ids = torch.cat([PROMPTS, PROMPTS.flip(0)[:, :1]], dim=1)
    with torch.no_grad():
        named = model(ids[:, :4], use_cache=True)
        expected = model(ids[:, 4:], past_key_values=named.past_key_values, use_cache=True).logits
        plain = model(ids[:, :4], use_cache=True, return_dict=False)
        step = model(ids[:, 4:], past_key_values=plain[1], use_cache=True, return_dict=False)
    assert torch.equal(plain[0], named.logits)
    assert torch.equal(step[0], expected)


def test_the_auxiliary_loss_is_in_a_plain_tuple_too(make: Maker):
    model = build_pico("llama")
    make.attach(model, MILORA, router_aux_loss_coef=1.0)
    model.train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_for_a_linear_that_is_not_targeted_leaves_the_model_untouched(field: str):
    model = build_pico("llama")
    before = trace(model)
    with pytest.raises(ValueError, match=f"{field}.*up_proj"):
        loramux.attach(
            model, loramux.LoraConfig(target_modules=("q_proj",), **{field: {"up_proj": 2}})
        )
    assert trace(model) == before
