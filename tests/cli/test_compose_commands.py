"""`loramux compose` and `loramux lower`: what they pass on, print and refuse."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import loramux
from compose.samples import save_lora
from loramux.cli.main import main, spread
from loramux.formats.peft import read_peft
from pico import build_pico


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), logging.getLogger("loramux").level
    yield
    root.handlers[:] = handlers
    logging.getLogger("loramux").setLevel(level)


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    model = build_pico("llama")
    kinds = {"music": (2, 0), "weather": (3, 1)}
    folders = [
        save_lora(model, tmp_path / name / "adapter", rank=rank, seed=seed, targets=("q_proj",))
        for name, (rank, seed) in kinds.items()
    ]
    return [str(folder) for folder in folders]


@pytest.fixture
def base(tmp_path: Path, tokenizer) -> str:
    build_pico("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_weights_follow_one_option_and_may_be_negative() -> None:
    args = ["compose", "cat", "a", "b", "--weights", "-0.5", "1e-2", ".5", "--out", "2"]
    assert spread(args) == [
        *("compose", "cat", "a", "b", "--weights", "-0.5", "--weights", "1e-2"),
        *("--weights", ".5", "--out", "2"),
    ]
    assert spread(["compose", "cat", "--weights", "1", "run"])[-1] == "run"


def test_a_folder_ends_the_files_of_data_and_a_suite_the_words_of_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("b").mkdir()
    assert spread(
        ["compose", "lorahub", "--data", "x.jsonl", "y.jsonl", "a", "b", "--out", "o"]
    ) == [*("compose", "lorahub", "--data", "x.jsonl", "--data", "y.jsonl", "a", "b", "--out", "o")]
    assert spread(["report", "--data", "a"]) == ["report", "--data", "a"]
    assert spread(["compare", "--only", "a", "b", "quick.yaml"]) == [
        *("compare", "--only", "a", "--only", "b", "quick.yaml")
    ]


def test_compose_writes_an_adapter_and_shows_what_it_did(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert (
        main(["compose", "svd", *pair, "--rank", "2", "--weights", "1", "-0.5", "--out", out]) == 0
    )
    shown = capsys.readouterr().out
    for text in ("Merged by", "music", "weather", "-0.500", "Cosine of the products", "q_proj"):
        assert text in shown
    assert shown.splitlines()[-1] == out
    assert read_peft(out).config["r"] == 2


def test_compose_prints_its_provenance_as_json(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "balance=false", "norm=l2", "--seed", "3", "--lambda", "0.5"]
    out = ["--out", str(tmp_path / "out"), "--json", "-"]
    assert main(["compose", "loralego", *pair, *arguments, *out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["options"]["balance"], found["options"]["norm"]) == (False, "l2")
    assert (found["seed"], found["lambda"], found["weights"]) == (3, 0.5, [0.5, 0.5])


def test_compose_searches_with_lorahub_on_task_rows(
    pair: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a b c", "answer": "yes"}, {"prompt": "d e", "answer": "no"}]
    data = tmp_path / "few.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--base", base, "--data", str(data), "--set", "budget=12", "combine=delta"]
    out = ["--out", str(tmp_path / "out"), "--json", "-"]
    assert main(["compose", "lorahub", *pair, *arguments, *out]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["search"]["evaluations"]) == 12 and found["search"]["rows"] == 2


def test_compose_arrow_saves_a_router_over_the_adapters(
    pair: list[str], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["compose", "arrow", *pair, "--base", base, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    model = build_pico("llama")
    model.name_or_path = base
    ids = torch.tensor([[5, 9, 33]])
    bare = model(input_ids=ids).logits
    loramux.load(model, out)
    assert (model(input_ids=ids).logits - bare).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mole"], "is trained over the adapters: write a recipe"),
        (["svt"], "did you mean 'svd'"),
        (["arrow"], "give --base"),
        (["arrow", "--weights", "1", "2"], "takes no weights"),
        (["ties", "--density", "2"], "density must be a number above 0"),
        (["cat", "--rank", "3"], "cat has no option 'rank'"),
        (["arrow", "--seed", "0", "--rows", "2"], "takes no rows, seed"),
        (["arrow", "--base", "b", "--set", "name=lora"], "takes no name"),
        (["arrow", "--base", "b", "--set", "adapters=3"], "takes no adapters"),
        (["cat", "--data", "missing.jsonl"], "cat reads no examples; leave out data"),
        (["cat", "--set", "x"], "--set takes KEY=VALUE"),
        (["cat", "--set", "seed=3"], "cat has no option 'seed'"),
        (["cat", "--set", "base=3"], "cat has no option 'base'"),
        (["cat", "--set", "lam=3"], "cat has no option 'lam'"),
        (["svd", "--set", "rank=["], "--set rank=[: the value is not readable as YAML"),
        (["loralego", "--set", "balance=maybe"], "balance must be true or false"),
    ],
)
def test_compose_says_in_one_line_what_is_wrong(
    arguments: list[str],
    message: str,
    pair: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, *more = arguments
    assert main(["compose", method, *pair, "--out", str(tmp_path / "out"), *more]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert shown[-1].startswith("error: ") and message in shown[-1]
    assert not (tmp_path / "out").exists()


def test_lower_exports_a_static_adapter(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["lower", pair[0], "--to", "peft", "--out", out]) == 0
    assert capsys.readouterr().out.startswith("static: 2 linears, rank 2 to 2")
    assert main(["lower", pair[0], "--out", out]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["lower", pair[0], "--out", out, "--force"]) == 0


def test_lower_makes_a_milora_plain_for_a_prompt(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    handle = loramux.attach(model, loramux.MiLoRAConfig(r=2, top_k=1))
    for parameter in handle.trainable_parameters().values():
        parameter.data.add_(0.1)
    handle.save(tmp_path / "mix")
    out = tmp_path / "out"
    arguments = ["lower", str(tmp_path / "mix"), "--base", base, "--out", str(out)]
    assert main([*arguments, "--prompt", "be quick", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["servability"], found["sites"]) == ("milora", "per_request", 2)
    assert main([*arguments, "--force", "--prompt", "x", "--template", "odd"]) == 2
    assert "--template must be task or chat" in capsys.readouterr().err
