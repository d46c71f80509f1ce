"""Every mixture is timed against a LoRA of the rank its change has."""

import json

import pytest
import torch

import loramux
from bench.efforts import PICO, TINY
from loramux.bench.run import bench
from loramux.bench.shape import build_base, twin_of
from loramux.bench.table import TARGETS
from loramux.bench.train_methods import MIXTURES, TASK, _attach


def test_every_mixture_has_a_row_and_there_is_a_control():
    result = json.loads(json.dumps(bench("methods", effort=TINY, show_progress=False)))
    *rows, control = result["rows"]
    assert [row["variant"] for row in rows] == [each.title for each in MIXTURES.values()]
    for row, each in zip(rows, MIXTURES.values(), strict=True):
        assert row["reference"] == f"PEFT LoRA r={each.active_rank} on all seven linears"
        assert row["target"] == TARGETS["method step/peft"] == 1.3
        assert row["ratio"] > 0
    assert control["verdict"] == "control"


@pytest.mark.parametrize("key", MIXTURES)
def test_the_active_rank_is_the_rank_of_the_change_that_a_token_gets(key: str):
    """At the first linear, whose input is the same with and without the adapter."""
    base = build_base(PICO).float()
    model = _attach(twin_of(base), key)
    handle = loramux.handle_of(model)
    torch.manual_seed(1)
    adapter = handle.adapters["default"]
    wanted = MIXTURES[key].active_rank
    site = next(path for path in adapter.rows if path.endswith("down_proj"))
    rows = adapter.rows[site].folded()
    ids = torch.arange(4, 9)[None]
    with torch.no_grad(), handle.batch(tasks=[TASK]):
        model(input_ids=ids)
    record = next(r for r in handle.routing() if r.path in (site, site.rpartition(".")[0]))
    gates_E = record.gates[0]
    act_R = gates_E[rows.spans.row_slot_R] != 0
    b_RO = torch.randn(rows.b.shape)
    rank = torch.linalg.matrix_rank(rows.a[act_R].T.double() @ b_RO[act_R].double())
    assert int(rank) == min(wanted, PICO.inner, PICO.width)
