"""`loramux doctor` says what a registry would say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuzz.hostile_archives import good
from fuzz.parcels import CONFIG, PREFIX, WEIGHTS, config, number, pack
from loramux.cli.main import main
from pico import INNER, WIDTH, build_pico


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "pico"
    build_pico("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def files() -> dict[str, bytes]:
    import numpy as np

    rng = np.random.default_rng(0)
    path = f"{PREFIX}model.layers.1.mlp.up_proj"
    made = {
        f"{path}.lora_A.weight": number(rng.normal(0, 0.1, (4, WIDTH))),
        f"{path}.lora_B.weight": number(rng.normal(0, 0.1, (INNER, 4))),
    }
    settings = config(target_modules=["model.layers.1.mlp.up_proj"])
    return {CONFIG: json.dumps(settings).encode(), WEIGHTS: pack(made)}


def test_a_sound_archive_is_described(base, files, tmp_path, capsys):
    archive = tmp_path / "adapter.zip"
    archive.write_bytes(good("zip", {**files, "README.md": b"#"}))
    assert main(["doctor", str(archive), "--base", str(base), "--json", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out").read_text())
    assert (
        result["ok"]
        and result["max_rank"] == 4
        and list(result["norms"]) == ["model.layers.1.mlp.up_proj"]
    )
    shown = capsys.readouterr().out
    assert result["digest"] in shown and "left out: README.md" in shown and "pico" in shown


def test_a_broken_folder_is_refused_with_its_code(base, files, tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert main(["doctor", str(folder), "--base", str(base)]) == 2
    assert capsys.readouterr().out.startswith("refused (pickle): 'optimizer.pt'")
    (folder / "optimizer.pt").unlink()
    assert main(["doctor", str(folder), "--base", str(base), "--max-rank", "3", "--json", "-"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["code"]) == (False, "rank_limit")


def test_what_is_not_there_is_said(base, tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "none"), "--base", str(base)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path), "--base", "some/model"]) == 2
    assert "give the folder of the base" in capsys.readouterr().err
