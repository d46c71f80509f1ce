"""Experts are named by what tells their folders apart."""

from __future__ import annotations

import pytest

from loramux.core.frozen import expert_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/snips/adapter", "runs/clinc/adapter"], ("snips", "clinc")),
        (["x/1/adapter", "y/1/adapter", "x/2/adapter"], ("x-1", "y-1", "x-2")),
        (["x/1/p/adapter", "y/1/p/adapter", "x/2/p/adapter"], ("x-1", "y-1", "x-2")),
        (["x/p/1/a", "y/p/1/a", "x/p/2/a", "x/q/1/a"], ("a-1", "a-2", "a-3", "a-4")),
        (["a", "A"], ("a-1", "a-2")),
        (["one"], ("one",)),
    ],
)
def test_the_last_part_then_the_last_two_then_a_number_tell_adapters_apart(
    paths: list[str], names: tuple[str, ...]
):
    assert expert_names(paths) == names


@pytest.mark.parametrize("paths", [["x/a", "x/a"], ["x/a", "x/a/"], ["x/a", "y/a", "x/a"]])
def test_one_folder_cannot_be_two_experts(paths: list[str]):
    with pytest.raises(ValueError, match="every adapter needs a folder of its own"):
        expert_names(paths)
