"""Every shipped recipe trains: a few steps on a tiny model and a few of its own rows, and what it saves loads."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import loramux
from conformance.cases import nudge
from loramux.methods import load_method
from loramux.recipe import Recipe, load_recipe
from loramux.train.run import train_recipe
from pico import build_pico, pico_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
ROWS = {"rows": 6, "skip": 0}
# Methods that act between steps, so that they do within the few there are; and what their ledger must hold then.
SOONER = {
    "alora": {"first_round": 1, "round_every": 1, "round_unit": "steps"},
    "beamlora": {"interval": 2, "end_step": 5},
}
LEDGER = {"alora": {"round", "prune", "add"}, "beamlora": {"plan", "expand"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama", max_position_embeddings=512).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def trained_adapters(paths: list[str], base: Path, root: Path) -> list[str]:
    """Folders that end like the named ones, with LoRAs of the tiny base in them."""
    folders = [root.joinpath(*Path(path).parts[-2:]) for path in paths]
    for seed, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        handle = loramux.attach(model, loramux.LoraConfig(r=2))
        nudge(handle.adapters["default"], seed)
        handle.save(folder)
    return list(map(str, folders))


def shortened(recipe: Recipe, base: Path, root: Path) -> Recipe:
    """The same recipe for a tiny base, few rows and four steps; adapters that it needs are made."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    raw |= {"base": str(base), "dtype": "float32"}
    if raw["method"] and "adapters" in raw["method"]:
        raw["method"]["adapters"] = trained_adapters(raw["method"]["adapters"], base, root)
    if raw["method"]:
        raw["method"].update(SOONER.get(raw["method"]["name"], {}))
    for part in (raw, *(raw.get("jobs") or ())):
        for split in ("train", "validation"):
            for source in part.get("data", {}).get(split, ()):
                source.update(ROWS)
        training = part.get("training", {})
        training.pop("epochs", None)
        training.pop("eval_every", None)
    raw["training"] = {**raw.get("training", {}), "steps": 4, "micro_batch_size": 4}
    return Recipe.model_validate(raw)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains_and_its_adapter_loads(path: Path, base: Path, tmp_path: Path):
    recipe = shortened(load_recipe(path), base, tmp_path)
    result = train_recipe(recipe, tmp_path / "run", progress=False)
    for job, resolved in zip(result["jobs"], recipe.jobs_resolved(), strict=True):
        assert job["status"] == "finished" and job["val_loss"] is not None
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        handle = loramux.load(model, job["adapter"])
        (adapter,) = handle.adapters.values()
        method = load_method(resolved.method.name)
        assert adapter.method.name == method.name or method.servability == "static"
        if method.name in LEDGER:
            edits = json.loads((tmp_path / "run" / "edits.json").read_text())
            assert LEDGER[method.name] <= {edit["what"] for edit in edits}
