"""The tenants' demo on a tiny base: every adapter is what it says, made once, and answered as if it were alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
import loramux.recipe
from loramux.cli.tenants import show
from loramux.demo import derive, tenants
from loramux.eval.generate import generate_model
from loramux.eval.loading import load_model
from loramux.formats.peft import read_peft
from loramux.formats.tensors import AdapterTensors, SiteTensors
from pico import build_pico, pico_tokenizer

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial_tenants.md"
MOST_LINES = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama", max_position_embeddings=1024).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run with two training steps per adapter."""
    root = tmp_path_factory.mktemp("run")
    out = root / "runs" / "tenants"
    with pytest.MonkeyPatch.context() as patch:
        _shorten(patch)
        patch.chdir(root)
        return root, tenants.main(out, str(base))


def _shorten(patch: pytest.MonkeyPatch) -> None:
    load = loramux.recipe.load_recipe
    short = ["training.epochs=null", "training.steps=2", "training.learning_rate=0.05"]

    def shortened(path: Path, overrides: list[str]) -> Any:
        return load(path, [*overrides, *short])

    patch.setattr(loramux.recipe, "load_recipe", shortened)
    for name, value in {"ANSWER_TOKENS": 4, "RATE_TOKENS": 5, "ROUNDS": 2}.items():
        patch.setattr(tenants, name, value)


def test_there_are_32_tenants_with_32_contents(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    shown = result["tenants"]
    assert len(shown) == 32
    for key in ("tenant", "adapter", "digest", "folder"):
        assert len({row[key] for row in shown}) == 32, key
    assert [row["error"] for row in shown] == [None] * 32
    assert all(len(row["digest"]) == 64 for row in shown)
    assert result["num_right"]["trained"]["of"] == 5


def test_every_answer_is_that_of_the_adapter_alone_on_the_core(
    run: tuple[Path, dict[str, Any]], base: Path
) -> None:
    _, result = run
    model = load_model(str(base))
    handle = None
    for row in result["tenants"]:
        if handle is None:
            handle = loramux.load(model.model, row["folder"], name=row["adapter"])
        else:
            handle.load(row["folder"], name=row["adapter"])
        handle.use(row["adapter"])
        (made,) = generate_model(
            model.model, model.tokenizer, [row["prompt"]], max_tokens=4, template=None
        )
        assert made["text"].strip() == row["text"], row["adapter"]
    assert len({row["text"] for row in result["tenants"]}) > 8


def test_the_batch_gives_the_tokens_that_each_tenant_gets_alone(
    run: tuple[Path, dict[str, Any]],
) -> None:
    speed = run[1]["speed"]
    assert speed["num_same"] == 32
    assert len(speed["batch_tokens_per_second"]) == len(speed["alone_tokens_per_second"]) == 2


def test_a_second_run_makes_nothing_again(
    run: tuple[Path, dict[str, Any]], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, first = run
    out = root / "runs" / "tenants"
    _shorten(monkeypatch)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.safetensors") if "optim" not in p.name}
    lost = out / "derived" / "snips-r2"
    (lost / derive.NOTE).unlink()
    second = tenants.main(out, str(base))
    after = {p: p.stat().st_mtime_ns for p in before}
    assert {p for p in before if before[p] != after[p]} == {lost / "adapter_model.safetensors"}
    assert [r["digest"] for r in second["tenants"]] == [r["digest"] for r in first["tenants"]]


def test_the_tutorial_is_twenty_lines_that_answer_every_tenant(
    run: tuple[Path, dict[str, Any]],
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, result = run
    code = snippet()
    assert len(code.splitlines()) <= MOST_LINES
    assert code.count('"smollm2-135m"') == 1
    monkeypatch.chdir(root)
    capsys.readouterr()
    exec(code.replace('"smollm2-135m"', repr(str(base))), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 32
    for line, row in zip(printed, result["tenants"], strict=True):
        assert line.startswith(f"{row['tenant']} {row['adapter']} ")
        assert row["digest"][:8] in line


def test_the_command_shows_every_tenant_and_the_sums(
    run: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, result = run
    wrong = {**result["tenants"][0], "is_right": False, "answer": "something else"}
    show({**result, "tenants": [wrong, *result["tenants"][1:]]})
    printed = capsys.readouterr().out
    for row in result["tenants"]:
        assert row["digest"][:8] in printed
    assert "no: something else" in printed
    for kind, count in result["num_right"].items():
        assert f"{count['right']} of {count['of']} {kind}" in printed
    assert "32 of 32 answers are the same alone" in printed


def snippet() -> str:
    found = re.search(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, "the tutorial shows no Python"
    return found[1]


# --- Derived adapters -----------------------------------------------------------------------------


@pytest.fixture
def adapter() -> AdapterTensors:
    """Two sites of rank 4, scale 2."""
    draw = torch.Generator().manual_seed(0)
    paths = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    sites = {
        path: SiteTensors(torch.randn(4, 8, generator=draw), torch.randn(4, 6, generator=draw))
        for path in paths
    }
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "peft_type": "LORA"}
    return AdapterTensors.build(config, sites)


def deltas(rows: derive.Scaled) -> dict[str, torch.Tensor]:
    return {path: b.T @ a for path, (a, b) in rows.items()}


def test_a_truncated_adapter_is_the_nearest_one_of_its_rank(adapter: AdapterTensors) -> None:
    whole = deltas(derive.folded(adapter))
    for rank in (1, 2, 4):
        made = derive.truncated(adapter, rank)
        for path, delta in deltas(made).items():
            assert made[path][0].shape[0] == rank
            left = torch.linalg.svdvals(whole[path])[rank:]
            error = torch.linalg.norm(whole[path] - delta)
            torch.testing.assert_close(error, torch.linalg.norm(left), atol=1e-4, rtol=1e-4)


def test_a_mix_is_the_weighted_sum_of_its_parts(adapter: AdapterTensors) -> None:
    (path, site), *_ = adapter.sites.items()
    other = AdapterTensors.build({**adapter.config, "lora_alpha": 4}, {path: site})
    made = deltas(derive.mixed([adapter, other], [0.7, 0.3]))
    product = site.b.T @ site.a
    torch.testing.assert_close(made[path], (0.7 * 2 + 0.3 * 1) * product)
    assert made.keys() == adapter.sites.keys()


def test_scale_and_sites_are_those_asked_for(adapter: AdapterTensors) -> None:
    (path, site), *_ = adapter.sites.items()
    torch.testing.assert_close(
        deltas(derive.scaled(adapter, 0.5))[path], site.b.T @ site.a
    )  # scale 2, halved
    assert derive.restricted(adapter, {path}).keys() == {path}


def test_what_is_written_is_what_was_derived_and_says_from_what(
    adapter: AdapterTensors, tmp_path: Path
) -> None:
    from torch import nn

    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([_Layer()])})})
    rows = derive.truncated(adapter, 2)
    assert derive.derive(tmp_path / "a", model, "rank 2", [adapter], lambda: rows)
    assert not derive.derive(tmp_path / "a", model, "rank 2", [adapter], lambda: rows)
    read = read_peft(tmp_path / "a")
    for path, delta in deltas(derive.folded(read)).items():
        wanted = rows[path][1].T @ rows[path][0]
        torch.testing.assert_close(delta, wanted, atol=0.2, rtol=0.02)  # rows are kept in bf16
    note = json.loads((tmp_path / "a" / derive.NOTE).read_text())
    assert note == {"how": "rank 2", "sources": [adapter.digest]}


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})
        self.mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 6)})
