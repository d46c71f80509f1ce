"""What a merge must not do to its inputs, and what it says before it begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import loramux
from compose.samples import save_lora
from formats.samples import snapshot
from loramux import compose_adapters, lower_adapter
from loramux.compose.routed import compose_router
from loramux.errors import LoramuxError
from pico import build_pico


@pytest.fixture
def given(tmp_path: Path) -> Path:
    return save_lora(build_pico("llama"), tmp_path / "in" / "adapter", targets=("q_proj",))


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    handle = loramux.attach(build_pico("llama"), loramux.MiLoRAConfig(r=2))
    return handle.save(tmp_path / "mixture")


@pytest.mark.parametrize("way", ["itself", "a link to it"])
def test_an_input_is_never_replaced_by_the_result_even_by_force(
    way: str, given: Path, tmp_path: Path
):
    out = given
    if way == "a link to it":
        out = tmp_path / "elsewhere" / "adapter"
        os.symlink(given.parent, out.parent)
    before = snapshot(given)
    for attempt in (
        lambda: compose_adapters("cat", [given], out, force=True),
        lambda: compose_router("arrow", [given], out, base="unused", force=True),
        lambda: lower_adapter(given, out, force=True),
    ):
        with pytest.raises(LoramuxError, match="is the adapter .* that is read"):
            attempt()
    assert snapshot(given) == before


def test_a_mixture_that_holds_an_input_is_never_replaced_even_by_force(mixture: Path):
    expert = next(folder for folder in sorted((mixture / "experts").iterdir()))
    before = snapshot(mixture)
    with pytest.raises(LoramuxError, match="holds the adapter .* that is read"):
        compose_adapters("cat", [expert], mixture, force=True)
    with pytest.raises(LoramuxError, match="holds the adapter .* that is read"):
        lower_adapter(expert, mixture, force=True)
    assert snapshot(mixture) == before


@pytest.mark.parametrize("place", ["file/out", "file/deeper/out"])
def test_a_place_where_nothing_can_be_made_is_refused_before_the_work(
    place: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / place
    monkeypatch.setattr("loramux.compose.run.read_sources", lambda _: pytest.fail("began"))
    for attempt in (
        lambda: compose_adapters("cat", [given], out),
        lambda: compose_router("arrow", [given], out, base="unused"),
        lambda: lower_adapter(given, out),
    ):
        with pytest.raises(LoramuxError, match=r"out cannot be made: Not a directory in .*file"):
            attempt()


def test_looking_whether_a_place_can_be_written_leaves_nothing_behind(given: Path, tmp_path: Path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LoramuxError, match="did you mean 'density'"):
        compose_adapters("ties", [given], tmp_path / "new" / "out", densty=1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("more", [{"data": ["missing.jsonl"]}, {"rows": 3}])
def test_examples_are_refused_by_a_merge_that_reads_none(more: Any, given: Path, tmp_path: Path):
    with pytest.raises(LoramuxError, match="cat reads no examples; leave out (data|rows)"):
        compose_adapters("cat", [given], tmp_path / "out", **more)


def test_options_may_be_a_mapping_whose_names_are_the_methods_only(given: Path, tmp_path: Path):
    made = compose_adapters("svd", [given], tmp_path / "out", options={"rank": 2})
    assert made["options"] == {"rank": 2}
    for name in ("seed", "base", "lam", "weights", "options"):
        with pytest.raises(LoramuxError, match=f"svd has no option '{name}'"):
            compose_adapters("svd", [given], tmp_path / "no", options={name: 3})


@pytest.mark.parametrize("value", ["maybe", 1, None])
def test_a_switch_is_true_or_false_and_nothing_else(value: Any, given: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="balance must be true or false, got"):
        compose_adapters("loralego", [given], tmp_path / "out", options={"balance": value})


def test_lego_is_not_measured_against_a_sum_it_does_not_stand_for(given: Path, tmp_path: Path):
    made = compose_adapters("loralego", [given], tmp_path / "out")
    assert made["distance"] is None
    assert {row["distance"] for row in made["sites"]} == {None}


def test_a_static_adapter_takes_no_template(given: Path, tmp_path: Path):
    with pytest.raises(LoramuxError, match="leave out prompt, task and template"):
        lower_adapter(given, tmp_path / "out", template="task")
