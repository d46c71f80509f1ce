"""Evaluation of task files: the right metric per task, exact numbers, clear refusals."""

import json

import pytest
import torch

from loramux.data.tasks import TaskRow
from loramux.errors import LoramuxError
from loramux.eval.run import evaluate, evaluate_model, mean_and_error, read_tasks
from pico import build_pico, pico_tokenizer

CHOICES = ("yes", "no", "maybe so")


def ranked_rows(number, task="colour"):
    return [
        TaskRow(task, f"{task}-{i}", f"is {'x' * (i % 4)} {i}?", CHOICES, CHOICES[i % 3])
        for i in range(number)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def task_file(tmp_path, name="colour", number=6):
    rows = [
        {"task": r.task, "id": r.id, "prompt": r.prompt, "choices": r.choices, "answer": r.answer}
        for r in ranked_rows(number, name)
    ]
    return write(tmp_path / f"{name}.jsonl", rows)


def expected_accuracy(model, tokenizer, rows, divide):
    """One pass per choice over plain text: what the evaluation claims to compute."""
    hits = []
    for row in rows:
        scores = []
        prompt = tokenizer(f"Question: {row.prompt}\nAnswer:")["input_ids"]
        for choice in row.choices:
            text = f" {choice}"
            tokens = tokenizer(text)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            total = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].sum().item()
            scores.append(total / divide(tokens, text))
        hits.append(row.choices[scores.index(max(scores))] == row.answer)
    return sum(hits) / len(hits)


def test_accuracies_are_those_of_one_pass_per_choice(tokenizer):
    model, rows = build_pico("llama"), ranked_rows(24)
    results = evaluate_model(model, tokenizer, {"colour": rows}, batch_size=5, progress=False)
    expected = {
        "token": expected_accuracy(model, tokenizer, rows, lambda tokens, _: len(tokens)),
        "raw": expected_accuracy(model, tokenizer, rows, lambda *_: 1),
        "byte": expected_accuracy(model, tokenizer, rows, lambda _, text: len(text.encode())),
    }
    assert {r["metric"]: r["value"] for r in results} == expected
    assert len(set(expected.values())) > 1  # else the three would not be told apart
    assert [r["metric"] for r in results] == ["token", "raw", "byte"]
    assert all(r["rows"] == 24 and r["task"] == "colour" for r in results)


def test_the_score_of_each_row_stands_at_its_place_whatever_the_batches(tokenizer):
    model, rows = build_pico("llama"), ranked_rows(12)
    (found,) = evaluate_model(
        model,
        tokenizer,
        {"a": rows},
        metrics=["token"],
        batch_size=5,
        progress=False,
        per_row=True,
    )
    alone = [
        evaluate_model(model, tokenizer, {"a": [row]}, metrics=["token"], progress=False)[0]
        for row in rows
    ]
    assert found["row_scores"] == [one["value"] for one in alone]
    assert 0 < sum(found["row_scores"]) < 12  # else an order could not be seen
    assert "row_scores" not in alone[0]


def test_batch_size_does_not_change_the_results(tokenizer):
    model, rows = build_pico("llama"), {"colour": ranked_rows(9)}
    one = evaluate_model(model, tokenizer, rows, batch_size=1, progress=False)
    assert evaluate_model(model, tokenizer, rows, batch_size=4, progress=False) == one


def speak(model, tokenizer, text):
    """Let the model answer every prompt with this text and its end token."""
    script = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    step = iter(script * 9)

    def say(_module, _args, logits):
        out = torch.full_like(logits, -10.0)
        out[..., next(step)] = 10.0
        return out

    model.lm_head.register_forward_hook(say)


def test_tasks_without_choices_are_generated_and_matched(tokenizer):
    model = build_pico("llama")
    speak(model, tokenizer, " 2 and 2 is 4")
    rows = [TaskRow("sum", str(i), f"{i} and {i}", None, str(2 * i)) for i in range(4)]
    (result,) = evaluate_model(model, tokenizer, {"sum": rows}, progress=False)
    assert (result["metric"], result["value"], result["rows"]) == ("exact_match", 0.25, 4)


def test_a_long_answer_gets_the_room_it_needs(tokenizer):
    model, answer = build_pico("llama"), "many words in a row, more than two dozen letters"
    speak(model, tokenizer, f" {answer}")
    rows = [TaskRow("talk", "1", "say it", None, answer.upper())]
    (result,) = evaluate_model(model, tokenizer, {"talk": rows}, progress=False)
    assert result["value"] == 1.0


def test_tasks_with_references_are_scored_with_bleu(tokenizer):
    rows = [TaskRow("talk", str(i), "say", None, "a b", ("a b", "b a")) for i in range(3)]
    model = build_pico("llama")
    (result,) = evaluate_model(model, tokenizer, {"talk": rows}, progress=False)
    assert result["metric"] == "bleu"
    assert 0.0 <= result["value"] <= 100.0
    wanted = ["exact_match", "bleu"]
    both = evaluate_model(model, tokenizer, {"talk": rows}, metrics=wanted, progress=False)
    assert [r["metric"] for r in both] == wanted


def test_the_chat_template_is_used_when_asked_for(tokenizer):
    seen = []
    model = build_pico("llama")
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    evaluate_model(model, tokenizer, {"colour": ranked_rows(1)}, template="chat", progress=False)
    prompt = tokenizer("<|user|>is  0?<|assistant|>")["input_ids"]
    assert seen[0][0, : len(prompt)].tolist() == prompt
    after = tokenizer.decode(seen[0][0, len(prompt) :])
    assert after == "yenmaybe s"  # the choices without their last tokens, and without a space


def test_the_model_is_measured_in_eval_mode_and_given_back_as_it_was(tokenizer):
    model = build_pico("llama").train()
    modes = []
    model.register_forward_hook(lambda module, _a, _o: modes.append(module.training))
    evaluate_model(model, tokenizer, {"colour": ranked_rows(2)}, progress=False)
    assert modes == [False]
    assert model.training


def test_standard_errors_are_those_of_a_mean():
    value, error = mean_and_error([1.0, 0.0, 0.0, 1.0, 1.0])
    assert value == pytest.approx(0.6)
    assert error == pytest.approx((0.6 * 0.4 / 4) ** 0.5)
    assert mean_and_error([1.0]) == (1.0, None)


def test_evaluate_returns_what_the_interface_names(base, tmp_path):
    paths = [task_file(tmp_path, "colour"), task_file(tmp_path, "shape", 3)]
    result = evaluate(base, data=paths, rows=4, progress=False)
    assert set(result) == {"results", "base", "adapter", "seconds"}
    assert {tuple(sorted(r)) for r in result["results"]} == {
        ("metric", "rows", "stderr", "task", "value")
    }
    rows = [(r["task"], r["rows"]) for r in result["results"]]
    assert rows == [("colour", 4)] * 3 + [("shape", 3)] * 3
    assert (result["base"], result["adapter"]) == (str(base), None)
    assert result["seconds"] > 0
    json.dumps(result, allow_nan=False)


def test_progress_goes_to_standard_error_only(base, tmp_path, capsys):
    evaluate(base, data=[task_file(tmp_path)], metrics=["token"])
    assert capsys.readouterr().out == ""


def test_files_of_one_task_are_put_together(tmp_path):
    first, second = task_file(tmp_path, "colour", 3), tmp_path / "more.jsonl"
    second.write_text(first.read_text())
    assert {k: len(v) for k, v in read_tasks([first, second], rows=2).items()} == {"colour": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": []}, "no data was given"),
        ({"data": ["nowhere.jsonl"]}, "no such file"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"metrics": ["tokens"]}, "did you mean 'token'"),
        ({"metrics": ["bleu"]}, "can be scored with token, raw, byte"),
        ({"adapter": "nowhere"}, "no adapter folder"),
        ({"dtype": "float23"}, "unknown dtype"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"base": "./nowhere"}, "no such folder"),
        ({"base": "some/model"}, "the base 'some/model' cannot be read: .* hub id"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(base, tmp_path, options, message):
    given = {"base": base, "data": [task_file(tmp_path)], "progress": False} | options
    with pytest.raises(LoramuxError, match=message):
        evaluate(**given)


def test_a_task_with_choices_in_some_rows_only_is_refused(tokenizer):
    rows = [*ranked_rows(1), TaskRow("colour", "x", "is it?", None, "yes")]
    with pytest.raises(LoramuxError, match="choices in 1 of 2 rows"):
        evaluate_model(build_pico("llama"), tokenizer, {"colour": rows}, progress=False)


def test_rows_beyond_the_models_positions_are_refused_by_id(tokenizer):
    rows = [TaskRow("colour", "long-one", "x" * 300, CHOICES, "yes")]
    with pytest.raises(LoramuxError, match=r"256 positions.*'long-one'"):
        evaluate_model(build_pico("llama"), tokenizer, {"colour": rows}, progress=False)
