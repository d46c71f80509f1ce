"""Ranking is exact: whatever the layout, a choice has the log-probability of a pass of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, MptConfig

from loramux.eval.ranking import (
    TREE_MODEL_TYPES,
    ChoiceRow,
    ChoiceScores,
    best_layout,
    choice_scores,
)
from pico import FAMILIES, build_pico

ROWS = [
    ChoiceRow((5, 9, 11, 4, 7), ((3,), (8, 2, 6), (3, 3)), (2, 9, 4)),
    ChoiceRow((12,), ((7, 1),), (5,)),
    ChoiceRow((6, 2, 2, 30, 31, 8, 19), ((40, 41), (40, 42), (13,)), (6, 6, 3)),
]


def alone(model, prompt, choice):
    """The definition: one unpadded pass, the log-probability of every token of the choice."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(choice) - 1)
    return sum(logits[at, token].item() for at, token in zip(places, choice, strict=True))


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_every_choice_the_score_of_its_own_pass(family, layout):
    model = build_pico(family)
    for scores in choice_scores(model, ROWS, layout=layout):
        expected = [alone(model, scores.row.prompt, choice) for choice in scores.row.choices]
        assert scores.sums == pytest.approx(expected, abs=1e-5)


def test_the_tree_computes_each_question_once():
    model = build_pico("llama")
    widths = []
    embed = model.model.embed_tokens
    embed.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape))
    choice_scores(model, ROWS[:1], layout="tree")
    choice_scores(model, ROWS[:1], layout="rows")
    assert widths == [(1, 5 + 0 + 2 + 1), (3, 5 + 2)]


def test_logits_are_computed_only_where_a_choice_is_predicted():
    model = build_pico("llama")
    kept = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: kept.append(args[0].shape[1]))
    choice_scores(model, ROWS, layout="tree")
    assert kept == [4]  # the end of the question and three inner tokens of the first row's choices


def test_metrics_divide_by_tokens_and_by_bytes():
    scores = ChoiceScores(ChoiceRow((1,), ((2, 3), (4,)), (8, 2)), (-4.0, -3.0))
    assert scores.values("raw") == [-4.0, -3.0]
    assert scores.values("token") == [-2.0, -3.0]
    assert scores.values("byte") == [-0.5, -1.5]
    assert (scores.best("raw"), scores.best("token")) == (1, 0)


def test_the_first_choice_wins_a_tie():
    assert ChoiceScores(ChoiceRow((1,), ((2,), (3,)), (1, 1)), (-1.0, -1.0)).best("raw") == 0


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'tokens'.*token, raw, byte"):
        ChoiceScores(ChoiceRow((1,), ((2,),), (1,)), (-1.0,)).values("tokens")


@pytest.mark.parametrize(("prompt", "choices"), [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_a_row_without_prompt_or_with_an_empty_choice_is_refused(prompt, choices):
    with pytest.raises(ValueError, match="needs a prompt and at least one choice"):
        ChoiceRow(prompt, choices, (1,) * len(choices))


def test_a_row_longer_than_the_sliding_window_is_ranked_without_the_tree():
    model = build_pico("mistral")
    model.config.sliding_window = 6
    assert best_layout(model, 6) == "tree"
    assert best_layout(model, 7) == "rows"
    long = ROWS[2]
    for scores in choice_scores(model, [long]):
        expected = [alone(model, long.prompt, choice) for choice in long.choices]
        assert scores.sums == pytest.approx(expected, abs=1e-5)


OTHERS = {
    "mpt": MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_family_that_the_tree_is_not_proven_for_is_ranked_exactly_too(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[kind]).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    for scores in choice_scores(model, ROWS):
        expected = [alone(model, scores.row.prompt, choice) for choice in scores.row.choices]
        assert scores.sums == pytest.approx(expected, abs=1e-5)


def test_the_tree_is_taken_for_the_families_it_is_tested_on_and_no_other():
    models = {build_pico(family).config.model_type for family in FAMILIES}
    assert models == TREE_MODEL_TYPES
    assert all(best_layout(build_pico(family), 9) == "tree" for family in FAMILIES)


def test_nan_scores_are_an_error():
    model = build_pico("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN log-probabilities"):
        choice_scores(model, ROWS[:1])


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_only_the_question_is_marked_as_prompt(layout, monkeypatch):
    model = build_pico("llama")
    masks, seen = [], []
    # As an attached model would: it takes the mask before the model itself sees the call.
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: (masks.append(kwargs.pop("prompt_mask")), (args, kwargs))[1],
        with_kwargs=True,
    )
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    monkeypatch.setattr("loramux.core.attach.handle_of", lambda _model: object())
    choice_scores(model, ROWS, layout=layout)
    prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(seen[0], masks[0], strict=True)]
    expected = [row.prompt for row in ROWS for _ in (row.choices if layout == "rows" else (0,))]
    assert prompts == expected
