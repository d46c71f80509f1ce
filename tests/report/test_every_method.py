"""A run of every method becomes a page: trained for a few steps, saved, read back, drawn, gates over a sentence too."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from conformance.cases import Maker, Variant, first_variants, named
from loramux.report.build import make_report
from pico import build_pico
from report.folders import make_base, records, train

STEPS = 3
# What a few steps need to reach an edit, beside the variant's own settings.
SOONER: dict[str, dict[str, Any]] = {
    "alora": {
        "first_round": 1,
        "round_every": 1,
        "round_unit": "steps",
        "rounds": 1,
        "score": "taylor",
    },
    "beamlora": {"interval": 2, "end_step": 3, "top_p": 0.6},
}
# Folders that hold other numbers than were trained: row gates folded into A, a probe's choice of linears, biases that
# are moved without a gradient.
SAVED_OTHERWISE = ("beamlora", "fanlora", "smora")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("experts"))


def run_of(variant: Variant, base: Path, maker: Maker, out: Path) -> tuple[Path, int]:
    """A run folder and how many numbers it trained; for a method that trains nothing, the saved adapter."""
    method = {"name": variant.method, "r": 4, **variant.settings, **SOONER.get(variant.method, {})}
    if variant.method_class.needs_adapters:
        method.pop("r")
        method["adapters"] = list(maker.expert_folders("llama"))
    model = build_pico("llama")
    model.name_or_path = str(base)
    torch.manual_seed(0)
    handle = loramux.attach(model, loramux.config_from_dict(dict(method)))
    count = sum(parameter.numel() for parameter in handle.trainable_parameters().values())
    if count:
        return train(base, out, method, steps=STEPS), count
    return handle.save(out), 0


@pytest.mark.parametrize("variant", first_variants(), ids=named)
def test_a_run_becomes_a_page(variant: Variant, base: Path, maker: Maker, tmp_path: Path) -> None:
    folder, trained = run_of(variant, base, maker, tmp_path / "run")
    result = make_report(folder, sentence="What comes after a?", base=str(base), task="ask")
    found = records(Path(result["report"]))
    (job,) = found["jobs"]
    assert job["method"] in (variant.method, "lora", "dora")
    assert not [part for part in result["missing"] if "cannot be read" in part["how"]]
    if found["kind"] == "run":
        assert [row["step"] for row in found["history"]["default"]] == [1, 2, 3]
        assert job["trained_parameters"] == trained or variant.method in SAVED_OTHERWISE
    servability = variant.method_class.servability
    if servability == "static":
        assert "sentence" not in found
        assert "Ranks" in result["sections"]
    else:
        assert found["sentence"]["routers"]
        width = len(found["sentence"]["tokens"])
        for router in found["sentence"]["routers"]:
            rows = width if router["when"] == "token" else 1
            assert [len(router["weights"]), len(router["weights"][0])] == [
                rows,
                len(router["columns"]),
            ]
    if servability != "static" and found["kind"] == "run":
        assert found["routing"]["default"]["routers"]
    if variant.method in ("alora", "beamlora"):
        assert found["ranks"]["default"]["edits"]
