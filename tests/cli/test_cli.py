"""Verbs pass on what they were told, print JSON alone when asked, and errors are one line."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.cli.main import main, spread
from loramux.errors import DataError

RECIPE = """
base: some/model
method: {name: lora, r: 4}
data: {train: [{path: "demo:snips/train.jsonl"}]}
training: {steps: 2}
"""
VERBS = ["fetch", "train", "eval", "generate", "batch", "methods", "bench", "demo"]
VERBS += ["tenants", "config schema", "compose", "lower", "report", "compare"]
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets up logging for its process; put it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("loramux").level
    yield
    root.handlers[:] = handlers
    logging.getLogger("loramux").setLevel(level)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the library function behind a verb; returns the list of its calls."""

    def install(module: str, name: str, result: Any) -> Calls:
        calls: Calls = []

        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            print("noise of a library")
            if isinstance(result, BaseException):
                raise result
            return result

        importlib.import_module(module.rpartition(".")[0])  # with its own parts, not with this one
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: function}))
        return calls

    return install


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


SCORES = {
    "results": [{"task": "t", "metric": "token", "value": 0.5, "stderr": None, "rows": 4}],
    "base": "b",
    "adapter": None,
    "seconds": 1.0,
}


def test_eval_takes_several_files_after_one_option(
    stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub("loramux.eval.run", "evaluate", SCORES)
    args = ["eval", "--base", "b", "--data", "x.jsonl", "y.jsonl", "--rows", "3", "--data", "z"]
    assert main(args) == 0
    ((base, adapter, data, rows), _) = calls[0]
    assert (base, adapter, data, rows) == ("b", None, ["x.jsonl", "y.jsonl", "z"], 3)
    assert "0.500" in capsys.readouterr().out


def test_json_on_standard_output_is_alone_there(
    stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("loramux.eval.run", "evaluate", SCORES)
    assert main(["eval", "--base", "b", "--data", "x", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == SCORES
    assert "noise" in captured.err


def test_json_goes_to_a_file_in_a_folder_made_for_it(
    stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("loramux.eval.run", "evaluate", SCORES)
    path = tmp_path / "new" / "scores.json"
    assert main(["eval", "--base", "b", "--data", "x", "--json", str(path)]) == 0
    assert json.loads(path.read_text()) == SCORES
    assert "token" in capsys.readouterr().out


def test_generate_prints_the_answers(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"results": [{"prompt": "p", "text": "answer", "tokens": [1]}]}
    calls = stub("loramux.eval.generate", "generate", result)
    assert main(["generate", "--base", "b", "--prompt", "p", "--max-tokens", "5", "--task"]) == 0
    args, options = calls[0]
    assert args == ("b", None, ["p"], 5)
    assert (options["template"], options["chat"]) == ("task", False)
    assert capsys.readouterr().out.splitlines()[-1] == "answer"


def test_a_task_may_be_named_to_adapters_that_go_by_tasks(stub: Any) -> None:
    result = {"results": [{"prompt": "p", "text": "answer", "tokens": [1]}]}
    generated = stub("loramux.eval.generate", "generate", result)
    evaluated = stub("loramux.eval.run", "evaluate", SCORES)
    assert main(["generate", "--base", "b", "--prompt", "p", "--task-name", "snips"]) == 0
    assert main(["eval", "--base", "b", "--data", "x", "--task-name", "snips"]) == 0
    assert main(["eval", "--base", "b", "--data", "x"]) == 0
    told = [options["task"] for _, options in (*generated, *evaluated)]
    assert told == ["snips", "snips", None]


def test_train_hands_over_the_checked_recipe(stub: Any, recipe: str, tmp_path: Path) -> None:
    calls = stub("loramux.train.run", "train_recipe", {"adapter": "x", "seconds": 1})
    out = tmp_path / "run"
    args = ["train", recipe, "--set", "training.steps=9", "seed=4", "--out", str(out)]
    assert main([*args, "--no-resume"]) == 0
    (handed, where), options = calls[0]
    (job,) = handed.jobs_resolved()
    assert (job.training.steps, job.seed, where) == (9, 4, out)
    assert options["resume"] is False


def test_a_value_for_set_does_not_swallow_the_recipe(stub: Any, recipe: str) -> None:
    calls = stub("loramux.train.run", "train_recipe", {"seconds": 1})
    assert main(["train", "--set", "seed=4", recipe, "--out", "x"]) == 0
    assert calls[0][0][0].seed == 4
    assert calls[0][1]["resume"] is True


def test_a_dry_run_prints_a_recipe_that_can_be_run(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, "--dry-run", "--set", "training.steps=7"]) == 0
    full = tmp_path / "full.yaml"
    full.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["train", str(full), "--dry-run", "--json", "-"]) == 0
    (job,) = json.loads(capsys.readouterr().out)["jobs"]
    assert job["training"]["steps"] == 7 and job["method"] == {"name": "lora", "r": 4}


def test_train_needs_a_folder(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", recipe]) == 2
    assert capsys.readouterr().err.startswith("error: --out DIR is missing")


def test_bench_shows_every_row(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"what": "decode", "variant": "v", "reference": "r", "batch": 1, "adapters": 1}
    row |= {"ratio": 1.05, "low": 1.0, "high": 1.1, "target": None}
    calls = stub("loramux.bench.run", "bench", {"rows": [row]})
    assert main(["bench", "decode", "--quick"]) == 0
    assert calls[0][0] == ("decode", True)
    assert "1.050" in capsys.readouterr().out
    assert main(["bench", "nothing"]) == 2


def test_demo_runs_where_it_is_told(stub: Any, tmp_path: Path) -> None:
    calls = stub("loramux.demo.run", "main", None)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert calls[0][1] == {"out": tmp_path, "base": "smollm2-135m"}


def test_fetch_prints_the_folder_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(name: str, *, dtype: str, gguf: Any, progress: Any) -> Path:
        progress(f"working on {name}")
        return Path("/cache/model")

    monkeypatch.setattr("loramux.fetch.fetch", fetch)
    assert main(["fetch", "smollm2-135m"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("/cache/model\n", "working on smollm2-135m\n")


def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "smolm2"]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "error: unknown model 'smolm2'; did you mean 'smollm2-135m'? allowed: smollm2-135m"
    ]


def test_methods_are_listed_for_people_and_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json", "-"]) == 0
    found = {m["name"]: m for m in json.loads(capsys.readouterr().out)["methods"]}
    assert {"lora", "milora", "mixlora", "mole"} <= set(found)
    wanted = {"name", "paper", "granularity", "routing_unit", "servability"}
    assert all(wanted <= set(entry) for entry in found.values())
    assert found["lora"]["servability"] == "static"
    assert {"loralego", "ties", "lorahub", "arrow"} <= set(found)
    assert main(["methods"]) == 0
    assert "milora" in capsys.readouterr().out


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "loramux recipe"


def test_an_error_of_the_user_is_one_line(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stub("loramux.eval.run", "evaluate", DataError("x:1: bad\n  row"))
    assert main(["eval", "--base", "b", "--data", "x"]) == 2
    assert capsys.readouterr().err == "error: x:1: bad row\n"


def test_debug_shows_the_traceback_wherever_it_stands(stub: Any) -> None:
    stub("loramux.eval.run", "evaluate", DataError("bad"))
    with pytest.raises(DataError):
        main(["eval", "--base", "b", "--data", "x", "--debug"])


def test_debug_can_be_set_in_the_environment(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("loramux.eval.run", "evaluate", DataError("bad"))
    monkeypatch.setenv("LORAMUX_DEBUG", "1")
    with pytest.raises(DataError):
        main(["eval", "--base", "b", "--data", "x"])


def test_an_error_of_ours_keeps_its_traceback(stub: Any) -> None:
    stub("loramux.eval.run", "evaluate", ValueError("raised by another library"))
    with pytest.raises(ValueError, match="another library"):
        main(["eval", "--base", "b", "--data", "x"])


def test_a_plain_value_error_of_our_own_code_is_for_the_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from loramux.data import plan_batches

    def misuse(*_: Any, **__: Any) -> None:
        plan_batches([], 1, seed=0, epochs=1)

    monkeypatch.setitem(sys.modules, "loramux.eval.run", SimpleNamespace(evaluate=misuse))
    assert main(["eval", "--base", "b", "--data", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot plan batches")


def test_a_file_that_cannot_be_written_is_named(
    stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("loramux.eval.run", "evaluate", SCORES)
    assert main(["eval", "--base", "b", "--data", "x", "--json", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_interruption_ends_with_130(stub: Any, recipe: str) -> None:
    stub("loramux.train.run", "train_recipe", KeyboardInterrupt())
    assert main(["train", recipe, "--out", "x"]) == 130


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    assert f"Example: loramux {verb}" in capsys.readouterr().out


def test_wrong_usage_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--nonsense"]) == 2
    assert main(["generate", "--base", "b"]) == 2
    assert main(["nothing"]) == 2


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    import loramux

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"loramux {loramux.__version__}\n"


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (["--data", "a", "b", "--rows", "3"], ["--data", "a", "--data", "b", "--rows", "3"]),
        (["r", "--set", "a=1", "b.c=2", "r2"], ["r", "--set", "a=1", "--set", "b.c=2", "r2"]),
        (["--data", "--rows", "3", "x"], ["--data", "--rows", "3", "x"]),
        (["--prompt", "a", "b"], ["--prompt", "a", "b"]),
    ],
)
def test_only_options_that_take_many_values_are_spread(given: list[str], seen: list[str]) -> None:
    assert spread(given) == seen
