"""Every method gets the same number of trainable parameters, or is refused, or is marked as unmatched."""

from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from compare.small import raw_suite
from loramux.compare import SuiteError, parse_suite
from loramux.compare.budget import Counter, Matched, match_all
from loramux.compare.schema import Suite
from pico import build_pico

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "wide"
    build_pico("llama", **WIDE).save_pretrained(folder)
    return str(folder)


def made(folder: Path, base: str, methods: dict[str, Any], tolerance: float = 0.03) -> Suite:
    methods = {"lora": {"method": {"name": "lora", "r": 8}}} | methods
    budget = {"of": "lora", "tolerance": tolerance}
    return parse_suite(raw_suite(folder, base=base, methods=methods, budget=budget))


def matched(suite: Suite) -> dict[str, Matched]:
    counter = Counter(suite.base, suite.dtype)
    return match_all(suite, counter, counter.layers)


METHODS = {
    "milora": {"method": {"name": "milora", "top_k": 2}},
    "mixlora": {"method": {"name": "mixlora", "num_experts": 4, "top_k": 2}},
    "dora": {"method": {"name": "lora", "use_dora": True}},
    "all": {"method": {"name": "lora"}, "scale": 1.0},
}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, base: str) -> Suite:
    return made(tmp_path_factory.mktemp("suite"), base, METHODS)


@pytest.fixture(scope="module")
def found(common: Suite) -> dict[str, Matched]:
    """Searched once: every test reads it, none changes it."""
    return matched(common)


def test_ranks_are_found_that_meet_the_budget(found: dict[str, Matched]) -> None:
    assert {label: abs(m.deviation) <= 0.03 for label, m in found.items()} == dict.fromkeys(
        ("lora", *METHODS), True
    )


@pytest.mark.parametrize("label", ["lora", *METHODS])
def test_what_is_counted_is_what_is_trained(
    common: Suite, found: dict[str, Matched], label: str
) -> None:
    match = found[label]
    name = common.methods[label].method.name
    handle = loramux.attach(
        build_pico("llama", **WIDE), loramux.config_from_dict({"name": name, **match.fields})
    )
    assert sum(p.numel() for p in handle.trainable_parameters().values()) == match.parameters


def test_where_a_rank_is_too_coarse_some_layers_get_one_more(found: dict[str, Matched]) -> None:
    match = found["mixlora"]
    assert "of 8 layers" in match.how
    config = loramux.config_from_dict({"name": "mixlora", **match.fields})
    ranks = {config.rank_at(f"model.layers.{i}.mlp.up_proj") for i in range(8)}
    assert len(ranks) == 2
    assert max(ranks) - min(ranks) == 1


def test_alpha_follows_the_rank_so_that_the_scale_is_the_same_everywhere(
    found: dict[str, Matched],
) -> None:
    for label, scale in {"lora": 2.0, "mixlora": 2.0, "all": 1.0}.items():
        name = "mixlora" if label == "mixlora" else "lora"
        config = loramux.config_from_dict({"name": name, **found[label].fields})
        scales = [config.scale_at(f"model.layers.{i}.mlp.up_proj") for i in range(8)]
        assert scales == pytest.approx([scale] * 8)


def test_what_cannot_be_met_is_refused_by_name_with_the_distance(tmp_path: Path, base: str) -> None:
    methods = {"huge": {"method": {"name": "mixlora", "num_experts": 64, "top_k": 2}}}
    with pytest.raises(SuiteError, match=r"cannot be met by huge: [\d,]+ \(\+\d+.*unmatched: true"):
        matched(made(tmp_path, base, methods))
    methods["huge"]["unmatched"] = True
    assert matched(made(tmp_path, base, methods))["huge"].deviation > 0.03


def test_without_a_field_to_search_a_method_is_taken_as_it_is_written(
    tmp_path: Path, base: str
) -> None:
    methods = {"half": {"method": {"name": "lora", "r": 4}, "match": None}}
    with pytest.raises(SuiteError, match=r"half: [\d,]+ \(-50.0%, as written\)"):
        matched(made(tmp_path, base, methods))


def test_counting_takes_no_memory_for_weights(base: str) -> None:
    counter = Counter(base, "float32")
    assert counter("lora", {"r": 8}) > 0
    assert all(p.device == torch.device("meta") for p in counter.model.parameters())
