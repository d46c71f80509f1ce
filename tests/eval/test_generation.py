"""Greedy answers and their judges: exact match and BLEU."""

import pytest
import torch
from sacrebleu.metrics import BLEU

from loramux.eval.generation import bleu, first_line, greedy, matches
from pico import EOS, build_pico


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        (" 12", "12", True),
        (" 3 + 9 = 12.", "12", True),
        (" 12 apples and 3 pears", "12", False),
        (" 1,200", "1200", True),
        (" 12.0", "12", True),
        (" -4", "4", False),
        (" twelve", "12", False),
        ("\n\n 12\n13", "12", True),
        (" 12\n13", "13", False),
        (" Yes", "yes", True),
        (" yes.", "yes", False),
        (" no\nyes", "yes", False),
        ("", "yes", False),
    ],
)
def test_numbers_match_by_the_last_one_and_texts_by_the_whole_line(text, answer, is_right):
    assert matches(text, answer) is is_right


def test_the_first_line_skips_empty_lines():
    assert first_line("\n \n a b \nc") == "a b"


def alone(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        with torch.inference_mode():
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == EOS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_a_left_padded_batch_decodes_as_each_prompt_alone(tokenizer):
    model = build_pico("llama")
    prompts = [[5, 9, 14], [20], [30, 31, 8, 19, 22, 6]]
    made = greedy(model, tokenizer, prompts, max_new_tokens=12)
    assert made == [alone(model, prompt, 12) for prompt in prompts]


def test_decoding_stops_when_every_first_line_is_complete(tokenizer):
    model = build_pico("llama")
    newline, letter = tokenizer("\na")["input_ids"]
    script = iter([[newline, letter], [letter, newline], [newline, letter], [letter, letter]])
    calls = []

    def speak(_module, _args, output):
        logits = torch.full_like(output, -10.0)
        for row, token in enumerate(next(script)):
            logits[row, -1, token] = 10.0
        calls.append(1)
        return logits

    model.lm_head.register_forward_hook(speak)
    made = greedy(model, tokenizer, [[5], [6]], max_new_tokens=9, first_line_only=True)
    # The first row's leading empty line does not count: it ends with its second line break.
    assert len(calls) == 3
    assert tokenizer.decode(made[0]).lstrip("\n") == "a\n"
    assert tokenizer.decode(made[1]).startswith("a\n")


HYPOTHESES = ["the cat sat on the mat", "a dog barks at night loudly", "birds fly very high today"]
REFERENCES = [
    ["the cat sat on a mat", "a cat was on the mat"],
    ["a dog barks at night"],
    ["birds fly very high", "some birds fly high today", "birds fly"],
]


def test_bleu_is_sacrebleus_corpus_score_with_several_references():
    padded = [refs + [None] * (3 - len(refs)) for refs in REFERENCES]
    streams = [list(stream) for stream in zip(*padded, strict=True)]
    value, error = bleu(HYPOTHESES, REFERENCES)
    assert value == pytest.approx(BLEU().corpus_score(HYPOTHESES, streams).score)
    assert 0 < error < 40


def test_the_error_of_bleu_is_repeatable_and_shrinks_with_more_rows():
    first = bleu(HYPOTHESES, REFERENCES, seed=3)
    assert first == bleu(HYPOTHESES, REFERENCES, seed=3)
    assert bleu(HYPOTHESES * 16, REFERENCES * 16)[1] < first[1] / 2


def test_equal_rows_leave_bleu_no_error():
    value, error = bleu(["the cat sat on the mat"] * 5, [["the cat sat on a mat"]] * 5)
    assert value > 30
    assert error == pytest.approx(0.0, abs=1e-9)


def test_a_single_row_has_no_standard_error():
    assert bleu(["the cat sat on the mat"], [["the cat sat on the mat"]])[1] is None


def test_bleu_wants_a_text_per_reference_list():
    with pytest.raises(ValueError, match="2 and 1"):
        bleu(["a", "b"], [["a"]])
