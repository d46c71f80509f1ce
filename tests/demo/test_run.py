"""The demo on a tiny base: every stage is stored with its time, and is made again only if its inputs changed."""

import json
from pathlib import Path
from typing import Any

import pytest

import loramux.recipe
from loramux.demo import run
from loramux.errors import FetchError
from pico import build_pico, pico_tokenizer


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in two weight files, and a demo of two steps."""
    load = loramux.recipe.load_recipe

    def short(path: Path, overrides: list[str]) -> Any:
        source = "{path: 'demo:clickbait/train.jsonl', rows: 4}"
        short = ["training.epochs=null", "training.steps=2", "training.eval_every=null"]
        short += [f"data.train=[{source}]", "data.validation=[]"]
        return load(path, [*overrides, *short])

    monkeypatch.setattr(loramux.recipe, "load_recipe", short)
    for name, value in {"ROWS": 2, "SAMPLES": 1, "ROUTED": 2, "NEW_TOKENS": 2}.items():
        monkeypatch.setattr(run, name, value)
    folder = tmp_path / "base"
    model = build_pico("llama", max_position_embeddings=1024)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    pico_tokenizer().save_pretrained(folder)
    return folder


def test_the_time_of_all_stages_is_kept_over_an_interruption(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    run.main(out, str(base))
    slow = {"before.json": 1000.0, "after.json": 200.0}
    for name, seconds in slow.items():
        stored = json.loads((out / name).read_text())
        assert 0 < stored["seconds"] < 100
        (out / name).write_text(json.dumps(stored | {"seconds": seconds}))
    result = json.loads((out / "result.json").read_text())
    result["jobs"][0]["seconds"] = 30.0  # most steps were in a part before an interruption
    (out / "result.json").write_text(json.dumps(result))
    seconds = run.main(out, str(base))["seconds"]
    assert 1230 <= seconds < 1330  # the stages that are not set here may round to nothing


def test_a_changed_weight_file_is_measured_again(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    one = run._digest(run.base_stamp(str(base)))
    last = sorted(base.glob("model-*.safetensors"))[-1]
    tensors = {name: tensor + 1 for name, tensor in load_file(last).items()}
    save_file(tensors, last, metadata={"format": "pt"})
    assert run._digest(run.base_stamp(str(base))) != one


def test_a_base_without_a_folder_is_refused() -> None:
    with pytest.raises(FetchError, match="some/model: is not in the hub's cache"):
        run.base_stamp("some/model")
