"""What a layer says of its mask is believed only where its rule agrees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from loramux.engine.masks import MaskRecord, window_of

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def within(window: int) -> Rule:
    return lambda _, __, query, key: (key <= query) & (query - key < window)


def chunked(size: int) -> Rule:
    return lambda _, __, query, key: (key <= query) & (query // size == key // size)


@pytest.mark.parametrize("window", [1, 2, 7, 64, 4096])
def test_a_window_that_the_rule_keeps_is_found(window: int) -> None:
    assert window_of(MaskRecord(within(window)), window) == window


def test_a_causal_rule_has_no_window() -> None:
    assert window_of(MaskRecord(causal), None) is None


@pytest.mark.parametrize(
    ("rule", "given"),
    [
        (causal, 16),
        (within(16), None),
        (within(16), 15),
        (within(16), 17),
        (chunked(16), None),
        (chunked(16), 16),
        (lambda _, __, query, key: key == key, None),
        (lambda _, __, query, key: key < query, None),
        (lambda _, __, query, key: (query - key).abs() < 16, 16),
    ],
    ids=[
        "a window that is not kept", "a window not spoken of", "too narrow", "too wide", "chunks",
        "chunks as wide as said", "both ways", "not itself", "a window both ways",
    ],
)  # fmt: skip
def test_what_is_neither_causal_nor_the_window_said_is_refused(
    rule: Rule, given: int | None
) -> None:
    with pytest.raises(ValueError, match="neither causal nor causal within"):
        window_of(MaskRecord(rule), given)


def test_a_mask_made_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="does not get its mask from transformers"):
        window_of(None, None)
