"""docs/adding-a-method.md builds a method; here its own code is cut out of the page and run."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import loramux
import loramux.methods
from conformance import test_engine, test_generate, test_identity, test_neighbours, test_time
from conformance.cases import Maker, Variant, every_variant, variants_of
from engine.crowd import load_all, save_variants
from pico import build_pico

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-method.md"
NAME = "ranktopk"
IDS = torch.tensor([[5, 17, 40, 61, 8, 29], [90, 33, 12, 7, 3, 4]])


def block(path: str) -> str:
    """The fenced code of the page that opens with a comment naming this file."""
    found = re.findall(rf"```\w+\n# {re.escape(path)}\n(.*?)```", PAGE.read_text(), flags=re.S)
    assert len(found) == 1, f"{PAGE.name} should hold {path} once, found {len(found)}"
    return str(found[0])


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's file, as if it lay in the package."""
    (tmp_path / f"{NAME}.py").write_text(block(f"src/loramux/methods/{NAME}.py"))
    monkeypatch.setattr(loramux.methods, "__path__", [*loramux.methods.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop(f"loramux.methods.{NAME}", None)
    vars(loramux.methods).pop(NAME, None)


@pytest.fixture
def written_test(method: None) -> ModuleType:
    module = ModuleType("written_test")
    exec(compile(block(f"tests/methods/test_{NAME}.py"), str(PAGE), "exec"), vars(module))
    return module


def test_the_tests_of_the_page_pass(written_test: ModuleType):
    claims = [value for name, value in vars(written_test).items() if name.startswith("test_")]
    assert len(claims) == 2
    for claim in claims:
        claim()


def test_the_method_is_found_by_its_file_name(method: None):
    listed = {entry["name"]: entry for entry in loramux.methods.list_methods()}
    assert listed[NAME]["servability"] == "per_token"
    with pytest.raises(ValueError, match=r"top_k must be in 1..r \(2\), got 3"):
        loramux.methods.config_from_dict({"name": NAME, "r": 2, "top_k": 3})


def test_saving_and_loading_change_nothing(method: None, tmp_path: Path):
    torch.manual_seed(0)
    config = loramux.methods.config_from_dict({"name": NAME, "r": 4})
    handle = loramux.attach(build_pico("llama"), config)
    for rows in handle.adapters["default"].rows.values():
        torch.nn.init.normal_(rows.b)
    with torch.no_grad():
        want = handle.model(IDS).logits
        handle.save(tmp_path / "saved")
        again = loramux.load(build_pico("llama"), tmp_path / "saved")
        torch.testing.assert_close(again.model(IDS).logits, want)


def test_what_the_conformance_suite_claims_of_every_method_holds_for_it(
    method: None, tmp_path: Path
):
    make, variant = Maker(tmp_path / "experts"), Variant(NAME, "default")
    assert variant in every_variant()
    test_identity.test_an_adapter_whose_b_is_zero_is_the_base(make, variant, "llama")
    test_time.test_an_answer_token_by_token_has_the_logits_of_the_whole_sequence(
        make, variant, "llama", "auto"
    )
    test_generate.test_greedy_tokens_with_a_cache_are_those_without(make, variant, "llama")
    neighbours = [variant, *variants_of("milora", "mixlora")]
    crowd = make.attach_all(build_pico("llama"), neighbours)
    for side in ("left", "right"):
        test_neighbours.test_a_request_does_not_see_its_neighbours(crowd, 11, 3, side)
    folders = save_variants(make, tmp_path / "saved", neighbours, "llama")
    loaded = load_all(build_pico("llama"), folders)
    test_engine.test_an_answer_alone_is_that_of_one_plain_forward(variant, folders, loaded)


def test_its_recipe_is_one(method: None):
    from loramux.recipe import Recipe

    recipe = Recipe.model_validate(yaml.safe_load(block(f"recipes/{NAME}.yaml")))
    (job,) = recipe.jobs_resolved()
    assert job.method.name == NAME
    assert loramux.methods.config_from_dict(job.method.model_dump()).method == NAME
