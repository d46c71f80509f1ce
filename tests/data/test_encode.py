"""Rows become examples as the task format says, whatever their format, and never lose their answer."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from loramux.data import DataSource, Example, load_examples
from loramux.errors import DataError
from loramux.recipe import TextTemplate

TASK = {"task": "t", "id": "t-0", "prompt": "two?", "choices": ["yes", "no"], "answer": "no"}


def only(path: str, tokenizer: Any, **options: Any) -> Example:
    (example,) = load_examples(DataSource(path=path), tokenizer, **options)
    return example


def supervised(example: Example, tokenizer: Any) -> str:
    ids = [i for i, flag in zip(example.input_ids, example.loss_mask, strict=True) if flag]
    return str(tokenizer.decode(ids))


def test_a_task_row_is_question_then_spaced_answer_then_end_token(
    write_jsonl: Any, tokenizer: Any
) -> None:
    example = only(write_jsonl(TASK), tokenizer)
    prompt = tokenizer("Question: two?\nAnswer:")["input_ids"]
    answer = tokenizer(" no")["input_ids"] + [tokenizer.eos_token_id]
    assert example.input_ids == tuple(prompt + answer)
    assert example.loss_mask == (False,) * len(prompt) + (True,) * len(answer)
    assert example.prompt_mask == (True,) * len(prompt) + (False,) * len(answer)
    assert example.task == "t"


def test_prompt_and_completion_are_taken_as_written(write_jsonl: Any, tokenizer: Any) -> None:
    example = only(write_jsonl({"prompt": "ab:", "completion": "cd"}), tokenizer)
    assert tokenizer.decode(example.input_ids) == "ab:cd<|im_end|>"
    assert supervised(example, tokenizer) == "cd<|im_end|>"


def test_a_text_template_is_filled_from_the_keys_of_the_row(
    write_jsonl: Any, tokenizer: Any
) -> None:
    template = TextTemplate(prompt="Q {ask}\n", completion="A {reply}")
    example = only(write_jsonl({"ask": "x", "reply": 7}), tokenizer, template=template)
    assert tokenizer.decode(example.input_ids) == "Q x\nA 7<|im_end|>"


def test_a_text_template_names_the_keys_a_row_lacks(write_jsonl: Any, tokenizer: Any) -> None:
    template = TextTemplate(prompt="{ask}", completion="{reply}")
    with pytest.raises(DataError, match=r"data.jsonl:1: the template needs \['reply'\]"):
        only(write_jsonl({"ask": "x"}), tokenizer, template=template)


def test_the_chat_template_turns_a_task_row_into_two_turns(
    write_jsonl: Any, tokenizer: Any
) -> None:
    example = only(write_jsonl(TASK), tokenizer, template="chat")
    text = "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    assert tokenizer.decode(example.input_ids) == text
    assert supervised(example, tokenizer) == "no<|im_end|>"


def test_long_prompts_lose_their_left_end_and_answers_nothing(
    write_jsonl: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "0123456789" * n, "completion": "end"} for n in (1, 5, 9)]
    with caplog.at_level(logging.WARNING):
        examples = load_examples(DataSource(path=write_jsonl(*rows)), tokenizer, sequence_len=20)
    assert [len(example) for example in examples] == [14, 20, 20]
    assert tokenizer.decode(examples[1].input_ids) == "4567890123456789end<|im_end|>"
    assert len(caplog.records) == 1 and "2 of 3 rows" in caplog.text


def test_an_answer_that_leaves_no_room_is_refused(write_jsonl: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r":1: the answer has 11 tokens.*sequence_len=11"):
        only(write_jsonl({"prompt": "p", "completion": "0123456789"}), tokenizer, sequence_len=11)


def test_a_begin_token_survives_the_cut(write_jsonl: Any, tokenizer: Any) -> None:
    row = {"prompt": "<|im_start|>" + "x" * 50, "completion": "y"}
    example = only(write_jsonl(row), tokenizer, sequence_len=8)
    assert tokenizer.decode(example.input_ids) == "<|im_start|>xxxxxy<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "answer": None, "choices": None}, "keys .* fit no row format"),
        ({"prompt": "p", "answer": float("nan")}, "'answer' must be a non-empty text, got nan"),
        ({"prompt": "p", "answer": " "}, "'answer' must be a non-empty text"),
        ({"prompt": None, "answer": "a"}, "'prompt' must be a non-empty text, got None"),
        ({"answer": "a"}, "'prompt' must be a non-empty text"),
        ({**TASK, "answer": "maybe"}, "'maybe' is not one of the choices"),
        ({**TASK, "choices": "yes"}, "'choices' must be null or a list"),
        ({**TASK, "choices": ["no", "no"]}, "at least two different"),
        ({**TASK, "references": "one"}, "'references' must be a list"),
        ({"prompt": "p", "answer": "a", "completion": "b"}, "both 'completion' and 'answer'"),
        ({"question": "p", "reply": "b"}, r"keys \['question', 'reply'\] fit no row format"),
        ({"prompt": "p", "completion": ""}, "'completion' must be a non-empty text"),
    ],
)
def test_a_bad_row_is_one_error_with_file_and_line(
    write_jsonl: Any, tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    path = write_jsonl({"prompt": "fine", "answer": "x"}, row)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        load_examples(DataSource(path=path), tokenizer)


def test_numbers_are_taken_as_text(write_jsonl: Any, tokenizer: Any) -> None:
    example = only(write_jsonl({"prompt": "p", "answer": 13}), tokenizer)
    assert supervised(example, tokenizer) == " 13<|im_end|>"


def test_an_example_cannot_supervise_its_first_token() -> None:
    with pytest.raises(ValueError, match="before the first supervised"):
        Example.build("t", [1, 2], [True, True])
    with pytest.raises(ValueError, match="at least one supervised"):
        Example.build("t", [1, 2], [False, False])
