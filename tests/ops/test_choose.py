"""The choice of a backend is a decision that can be read, and a request for the impossible is an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loramux.ops import cpu
from loramux.ops.choose import (
    BACKENDS,
    MAX_DENSE_RANK,
    Choice,
    choose_backend,
    load_backend,
)
from ops.cases import assert_close, exact, random_case


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORAMUX_NO_CC", "1")
    cpu.kernel.cache_clear()
    yield
    cpu.kernel.cache_clear()


def choose(requested: str = "auto", **change: object) -> Choice:
    given = {
        "device": "cpu", "dtype": torch.bfloat16, "num_rows": 4, "needs_grad": False, "total_rank": 8,
    }  # fmt: skip
    return choose_backend(**{**given, **change}, requested=requested)  # type: ignore[arg-type]


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
def test_few_rows_without_gradient_run_in_the_kernel() -> None:
    assert choose().name == "cpu"
    assert choose(num_rows=cpu.max_rows()).name == "cpu"
    assert choose(num_rows=cpu.max_rows() + 1).name == "reference"


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"needs_grad": True}, "reference", "no gradient"),
        ({"dtype": torch.float64}, "reference", "not torch.float64"),
        ({"num_rows": 4096}, "reference", "few enough"),
        ({"num_rows": 4096, "total_rank": MAX_DENSE_RANK + 1}, "grouped", "too many to compute"),
        ({"needs_grad": True, "total_rank": MAX_DENSE_RANK + 1}, "grouped", "too many to compute"),
        ({"device": "cuda", "needs_grad": True}, "reference", "triton"),
        ({"device": "meta"}, "reference", "no kernel for meta"),
    ],
)
def test_the_reason_says_what_decided(change: dict[str, object], name: str, reason: str) -> None:
    choice = choose(**change)
    assert choice.name == name and reason in choice.reason
    assert str(choice) == f"{name}: {choice.reason}"


def test_autocast_keeps_the_kernel_out() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        choice = choose(dtype=torch.float32)
    assert choice.name == "reference" and "autocast" in choice.reason


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_torch_runs_and_the_reason_says_so() -> None:
    choice = choose()
    assert choice.name == "reference" and "LORAMUX_NO_CC" in choice.reason
    with pytest.raises(
        ValueError,
        match="backend 'cpu' cannot run here: LORAMUX_NO_CC=1 is set.*reference .available",
    ):
        choose("cpu")


def test_a_request_is_honoured_or_refused_with_the_alternatives() -> None:
    assert choose("grouped") == Choice("grouped", "asked for")
    with pytest.raises(ValueError, match=r"'fast' does not exist.*'auto'.*reference \(available\)"):
        choose("fast")
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: it has no gradient"):
        choose("cpu", needs_grad=True)
    with pytest.raises(ValueError, match=r"'cpu' cannot run here: rows are on cuda"):
        choose("cpu", device="cuda")
    with pytest.raises(ValueError, match=r"'triton' cannot run here"):
        choose("triton")


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "triton"])
def test_every_name_in_the_table_loads_and_computes(name: str) -> None:
    case = random_case(1, dtype=torch.float32)
    assert_close(load_backend(name)(*case.args()), exact(case))
