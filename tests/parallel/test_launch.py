"""One command of an existing launcher trains a recipe by two processes; what cannot be started so is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loramux.train.parallel import ParallelError, connected, is_first_process
from pico import build_pico, pico_tokenizer


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    build_pico("llama", max_position_embeddings=1024).save_pretrained(tmp_path / "base")
    pico_tokenizer().save_pretrained(tmp_path / "base")
    path = tmp_path / "recipe.yaml"
    content = {
        "base": str(tmp_path / "base"),
        "dtype": "float32",
        "method": {"name": "lora", "r": 2, "lora_dropout": 0.1},
        "data": {"train": [{"path": "demo:snips/train.jsonl", "rows": 12}]},
        "training": {"steps": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_torchrun_trains_a_recipe_and_one_process_writes_and_shows(
    recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "loramux", "train", str(recipe), "--out", str(out), "--json", "-"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # of one process, or it would be two values
    assert told["steps"] == 2
    assert told == json.loads((out / "result.json").read_text())
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert len(json.loads((out / "history.json").read_text())) == 2


def test_without_a_launcher_there_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with connected() as group:
        assert group is None
    assert is_first_process()
    only = "there is only this one; start several with torchrun"
    with pytest.raises(ParallelError, match=only), connected(shards_base=True):
        pass


def test_half_a_launch_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    how = "start them with torchrun or accelerate launch"
    with pytest.raises(ParallelError, match=how), connected():
        pass
