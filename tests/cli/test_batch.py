"""A file of requests: bad lines are found first, every line is answered once, an interrupted run continues."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import typer
from typer.testing import CliRunner

from loramux.cli.batch import batch
from loramux.engine.offline import read_done, read_jobs, run_jobs
from loramux.engine.request import Answered, Completion, Delta
from loramux.errors import DataError, LoramuxError
from pico import pico_tokenizer


class EchoEngine:
    """Says its prompt again, one request per step, the last one added first."""

    made: ClassVar[list[EchoEngine]] = []

    def __init__(self, base: str, **options: Any):
        self.base, self.options = base, options
        self.tokenizer = pico_tokenizer()
        self.adapters: dict[str, str] = {}
        self.asked: list[Any] = []
        self.open: list[Any] = []
        self.num_steps = 0
        self.is_closed = False
        self.made.append(self)

    def add_adapter(self, name: str, folder: str) -> None:
        self.adapters[name] = folder

    def add_request(self, request: Any) -> str:
        if request.prompt == "too long":
            raise ValueError("a prompt of 999 tokens exceeds the model's 256 positions")
        self.asked.append(request)
        self.open.append(request)
        return str(request.id)

    def step(self) -> list[Delta]:
        self.num_steps += 1
        if self.num_steps == getattr(self, "interrupt_at", None):
            raise KeyboardInterrupt
        request = self.open[-1]
        return [
            Delta(request_id=request.id, index=i, text="", token_ids=(), finish_reason="stop")
            for i in range(request.params.n)
        ]

    def completion(self, request_id: str) -> list[Completion] | None:
        request = next(r for r in self.open if r.id == request_id)
        self.open.remove(request)
        failed = request.prompt == "nan"
        parts = tuple((name, f"digest of {name}", weight) for name, weight in request.mix)
        return [
            Completion(
                request_id=request_id, index=i, tenant=request.tenant, text=f"{request.prompt}!",
                token_ids=(5, 6, 7), finish_reason="error" if failed else "stop", prompt_tokens=4,
                answered=Answered("digest", parts), error="not finite" if failed else None,
            )
            for i in range(request.params.n)
        ]  # fmt: skip

    def __enter__(self) -> EchoEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EchoEngine]]:
    """The engines that the command makes."""
    monkeypatch.setitem(sys.modules, "loramux.engine.engine", SimpleNamespace(Engine=EchoEngine))
    monkeypatch.setattr(EchoEngine, "made", [])
    yield EchoEngine.made
    assert all(engine.is_closed for engine in EchoEngine.made)


def lines(path: Path, *rows: Any) -> Path:
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def run(*args: Any) -> Any:
    app = typer.Typer()
    app.command()(batch)
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answers(out: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len({row["line"] for row in rows}) == len(rows), "a line was answered twice"
    return {row["line"]: row for row in rows}


def test_every_line_is_answered_with_its_adapter_and_parameters(
    engines: list[EchoEngine], tmp_path: Path
) -> None:
    for name in ("law", "tone"):
        (tmp_path / name).mkdir()
    file = lines(
        tmp_path / "in.jsonl",
        {"prompt": "one", "id": "first"},
        "",
        {"prompt": "two", "adapter": "law", "max_tokens": 7, "stop": ["\n"], "n": 2},
        {"prompt": [4, 5], "adapter": {"law": 0.5, "tone": 2}, "tenant": "acme"},
        {"messages": [{"role": "user", "content": "hey"}], "temperature": 0.5, "seed": 3},
    )
    out = tmp_path / "new" / "out.jsonl"
    made = run(
        file, "--base", "b", "--out", out, "--max-tokens", 9, "--json", "-",
        "--adapter", f"law={tmp_path / 'law'}", "--adapter", f"tone={tmp_path / 'tone'}",
    )  # fmt: skip
    summary = json.loads(made.stdout)
    assert (summary["lines"], summary["skipped"], summary["failed"]) == (4, 0, 0)
    assert summary["tokens"] == 3 * 5
    engine = engines[0]
    assert engine.adapters == {name: str(tmp_path / name) for name in ("law", "tone")}
    first, second, third, fourth = engine.asked
    assert (first.params.max_tokens, second.params.max_tokens) == (9, 7)
    assert (second.params.stop, second.params.n) == (("\n",), 2)
    assert third.mix == (("law", 0.5), ("tone", 2.0)) and third.tenant == "acme"
    assert engine.tokenizer.decode(fourth.prompt) == "<|user|>hey<|assistant|>"
    assert (fourth.params.temperature, fourth.params.seed) == (0.5, 3)
    got = answers(out)
    assert sorted(got) == [1, 3, 4, 5]
    assert got[1]["id"] == "first" and got[1]["answers"][0]["text"] == "one!"
    assert len(got[3]["answers"]) == 2
    assert got[3]["adapters"] == [{"name": "law", "digest": "digest of law", "weight": 1.0}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "one JSON object, got list"),
        ({"prompt": "x", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "x", "messages": []}, "either 'prompt' or 'messages'"),
        ({"adapter": "a"}, "either 'prompt' or 'messages'"),
        ({"prompt": ""}, "prompt must be"),
        ({"prompt": [1, "2"]}, "prompt must be"),
        ({"messages": []}, "messages must be"),
        ({"messages": [{"role": "user"}]}, "a message must hold"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens must be"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be"),
        ({"prompt": "x", "stop": 5}, "stop must be a list"),
        ({"prompt": "x", "adapter": "aa"}, "did you mean 'a'"),
        ({"prompt": "x", "adapter": {"a": 1, "zz": 1}}, "no adapter 'zz'"),
        ({"prompt": "x", "adapter": {"a": "1"}}, "weights of a mix"),
        ({"prompt": "x", "adapter": ["a"]}, "adapter must be"),
        ({"prompt": "x", "adapter": {}}, "adapter must be"),
        ({"prompt": "x", "tenant": ""}, "tenant must be"),
        ({"prompt": "x", "id": [1]}, "id must be"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(
    row: Any, message: str, engines: list[EchoEngine], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    file = lines(tmp_path / "in.jsonl", {"prompt": "fine"}, row)
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        run(file, "--base", "b", "--out", out, "--adapter", f"a={tmp_path / 'a'}")
    assert not engines and not out.exists()


def test_many_bad_lines_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", {"prompt": "x"}, *["{"] * 8)
    with pytest.raises(DataError, match="8 of 9 lines .* line 6: .*and 3 more"):
        read_jobs(file)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no line to answer"):
        read_jobs(lines(tmp_path / "in.jsonl", "", ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_jobs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("value", ["law", "law=", "=x", "law=no/such/folder"])
def test_an_adapter_is_given_by_name_and_folder(value: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", {"prompt": "x"})
    with pytest.raises(LoramuxError, match="--adapter"):
        run(file, "--base", "b", "--out", tmp_path / "o", "--adapter", value)


def test_an_interrupted_run_continues_where_it_stopped(
    engines: list[EchoEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lines(tmp_path / "in.jsonl", *({"prompt": f"q{i}"} for i in range(6)))
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(EchoEngine, "interrupt_at", 4, raising=False)
    assert run(file, "--base", "b", "--out", out).exit_code == 130
    assert len(answers(out)) == 3
    monkeypatch.delattr(EchoEngine, "interrupt_at")
    with out.open("a", encoding="utf-8") as written:
        written.write('{"line": 2, "key": "cut off in the mid')
    made = run(file, "--base", "b", "--out", out)
    assert "3 lines answered, 3 were there" in made.stdout
    assert len(engines[1].asked) == 3
    assert sorted(answers(out)) == [1, 2, 3, 4, 5, 6]
    run(file, "--base", "b", "--out", out)
    assert len(engines) == 2, "with nothing left to answer no model is read"


def test_an_answer_is_on_disk_as_soon_as_it_is_there(tmp_path: Path) -> None:
    jobs = read_jobs(lines(tmp_path / "in.jsonl", {"prompt": "one"}, {"prompt": "two"}))
    out, seen = tmp_path / "out.jsonl", []
    run_jobs(EchoEngine("b"), jobs, out, lambda record: seen.append(sorted(answers(out))))
    assert seen == [[2], [1, 2]]


@pytest.mark.parametrize(
    ("row", "args"),
    [({"prompt": "another"}, ["b"]), ({"prompt": "x"}, ["c"]), ({"prompt": "x"}, ["b", "9"])],
)
def test_an_output_is_not_continued_with_other_questions(
    row: Any, args: list[str], engines: list[EchoEngine], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run(lines(tmp_path / "in.jsonl", {"prompt": "x"}), "--base", "b", "--out", out)
    file = lines(tmp_path / "in.jsonl", row, {"prompt": "more"})
    more = ["--max-tokens", args[1]] if len(args) > 1 else []
    with pytest.raises(DataError, match="answer to line 1"):
        run(file, "--base", args[0], "--out", out, *more)
    assert len(answers(out)) == 1


def test_a_file_of_another_kind_is_not_written_to(tmp_path: Path) -> None:
    out = lines(tmp_path / "notes.txt", "not an answer")
    with pytest.raises(DataError, match="line 1 was not written"):
        read_done(out, [])
    file = lines(tmp_path / "in.jsonl", {"prompt": "x"})
    with pytest.raises(DataError, match="is the file of requests"):
        run(file, "--base", "b", "--out", file)


def test_a_line_that_fails_is_recorded_and_the_others_are_answered(
    engines: list[EchoEngine], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    rows = [{"prompt": "too long"}, {"prompt": "nan"}, {"prompt": "fine"}]
    with pytest.raises(LoramuxError, match="2 of 3 lines have no full answer"):
        run(lines(tmp_path / "in.jsonl", *rows), "--base", "b", "--out", out)
    got = answers(out)
    assert "256 positions" in got[1]["error"] and "answers" not in got[1]
    assert got[2]["error"] == "not finite"
    assert "error" not in got[3]


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{{ raise_exception('turns must alternate') }}", "alternate")],
)
def test_messages_that_the_chat_template_cannot_take_are_named(
    template: str | None, message: str, tmp_path: Path
) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = template
    row = {"messages": [{"role": "user", "content": "hey"}]}
    (job,) = read_jobs(lines(tmp_path / "in.jsonl", row))
    with pytest.raises(DataError, match=f"line 1: .*{message}"):
        job.request(tokenizer)


def test_the_help_has_an_example() -> None:
    assert "Example: loramux batch" in " ".join(run("--help").stdout.split())


def test_the_real_engine_answers_a_file_as_the_model_would(
    tmp_path: Path, pico: Any, tokenizer: Any
) -> None:
    pico.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": text, "ignore_eos": True} for text in ("one", "two, three", "4")]
    file = lines(tmp_path / "in.jsonl", *rows, {"messages": [{"role": "user", "content": "hey"}]})
    out = tmp_path / "out.jsonl"
    run(file, "--base", tmp_path / "base", "--out", out, "--max-tokens", 8, "--kv-memory", "4MiB")
    got = answers(out)
    for number, row in enumerate(rows, start=1):
        ids = tokenizer(row["prompt"])["input_ids"]
        for _ in range(8):
            ids.append(int(pico(torch.tensor([ids])).logits[0, -1].argmax()))
        assert got[number]["answers"][0]["token_ids"] == ids[-8:]
    assert got[4]["prompt_tokens"] == len(["<|user|>", *"hey", "<|assistant|>"])
