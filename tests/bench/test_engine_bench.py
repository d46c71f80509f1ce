"""The engine's measurements end to end on a tiny shape: every promised row is there with its target and its peers.

Nothing here looks at the numbers.
"""

import json
from dataclasses import replace

import pytest

from bench.efforts import PICO, TINY
from loramux.bench import engine_subjects as e
from loramux.bench.adapters import by_name, save_tenants
from loramux.bench.checks import Reference
from loramux.bench.decode import Decoder, make_prompt
from loramux.bench.load import COLD, FURTHER, HOTSWAP, SLOT, SWITCH
from loramux.bench.peers import line_up, not_here
from loramux.bench.plot import save_chart
from loramux.bench.run import bench
from loramux.bench.shape import build_base
from loramux.bench.streams import build_engine
from loramux.bench.table import TARGETS, Compared, at_batch

KEYS = ("what", "variant", "reference", "batch", "adapters", "ratio", "low", "high", "target")
NAMES = ("decode", "prefill", "mixed", "load", "residency", "serve")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def results():
    """Each measurement once, when first asked for."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = bench(name, part="engine", effort=TINY, show_progress=False)
        return found[name]

    return of


@pytest.fixture(scope="module")
def tenants(tmp_path_factory):
    base = build_base(PICO)
    folder = tmp_path_factory.mktemp("tenants")
    return base, save_tenants(base, folder, plain=5, milora=2, mixlora=2, gated=2)


def target(result, variant, reference, batch):
    (row,) = [
        row
        for row in result["rows"]
        if (row["variant"], row["reference"], row["batch"])
        == (e.TITLES.get(variant, variant), e.TITLES.get(reference, reference), batch)
    ]
    return row["target"]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_the_agreed_keys_a_control_beside_it_and_survives_json(name, results):
    result = json.loads(json.dumps(results(name)))
    assert result["bench"] == name
    for row in result["rows"]:
        assert tuple(row)[: len(KEYS)] == KEYS
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["verdict"] in ("met", "missed", "open", "control", "")
    has_control = any(row["verdict"] == "control" for row in result["rows"])
    assert has_control == (name != "load")  # a load is held against milliseconds


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_a_png(name, results, tmp_path):
    path = save_chart(results(name), tmp_path / "rows.png")
    assert path.read_bytes().startswith(PNG)


def test_decode_holds_tenants_against_own_base_transformers_and_peft(results):
    result = results("decode")
    assert target(result, e.TENANTS, e.BASE, 8) == 1.08
    assert target(result, e.TENANTS, e.BARE, 8) == 0.75
    assert target(result, e.TENANTS, e.BARE, 1) == 0.6
    assert target(result, e.TENANTS, e.PEFT, 8) == pytest.approx(1 / 4.5)
    assert target(result, e.MILORA, e.TENANTS, 8) == 1.02
    assert target(result, e.GATED, e.BARE, 1) == 1.6
    for peer in (e.XLORA, e.ARROW):
        assert target(result, peer, e.BARE, 1) is None
    how = result["machine"]["backends"]["decode steps of the engine"]
    assert how == "launch by launch: the model is on cpu"


def test_targets_of_a_batch_size_are_left_to_it():
    row = Compared("decode", e.TENANTS, e.BASE, "tenants/own base")
    assert [at_batch([row], batch)[0].target for batch in (1, 8, 32)] == [
        None,
        "tenants/own base @ 8",
        "tenants/own base @ 32",
    ]
    (lora,) = at_batch([replace(row, target="lora/bare")], 8)
    assert TARGETS[lora.target] == 1.10


def test_prefill_is_held_against_the_bare_model(results):
    assert target(results("prefill"), e.TENANTS, e.BARE, 2) == 0.8
    assert target(results("prefill"), e.TENANTS, e.PEFT, 2) is None


def test_the_mixed_batch_has_its_target_at_32_requests_and_every_kind_a_row(results):
    result = results("mixed")
    assert target(result, e.MIXED, e.TENANTS, 4) is None
    assert TARGETS["mixed/tenants @ 32"] == 1.5
    for kind in (e.MILORA, e.MIXLORA, e.GATED):
        assert target(result, kind, e.TENANTS, 1) is None


def test_cold_and_warm_adapters_are_held_against_milliseconds_and_peft(results):
    rows = {(row["variant"], row["reference"]): row for row in results("load")["rows"]}
    assert rows.keys() == {(COLD, FURTHER), (COLD, HOTSWAP), (SLOT, SWITCH)}
    assert {row["target_ms"] for (v, _), row in rows.items() if v == COLD} == {40.0}
    assert rows[SLOT, SWITCH]["target_ms"] == 1.0


def test_residency_has_its_target_at_the_largest_number(results):
    rows = [row for row in results("residency")["rows"] if row["what"] == "residency"]
    found = {(row["adapters"], row["in_batch"]): row["target"] for row in rows}
    assert found == {(3, 1): None, (3, 3): None, (9, 1): 1.05, (9, 8): 1.05}


def test_serving_reports_tokens_per_second_and_latencies(results):
    result = results("serve")
    (whole,) = [row for row in result["rows"] if row["target"] is not None]
    assert whole["target"] == pytest.approx(1 / 1.3)
    assert whole["tokens_per_s"] > 0 and whole["reference_tokens_per_s"] > 0
    assert whole["adapters"] == TINY.serve_adapters
    latencies = [row for row in result["rows"] if row["what"].startswith(("first", "between"))]
    assert len(latencies) == 8
    assert len(result["details"]["quantiles"]) == 3
    for values in result["details"]["quantiles"].values():
        assert values.keys() == {"ttft", "itl"}
        assert all(len(v) == 101 and v == sorted(v) for v in values.values())


def test_tenants_have_different_weights_and_a_fourth_of_a_mixed_batch_is_of_each_kind(tenants):
    _, made = tenants
    files = [folder / "adapter_model.safetensors" for folder in made.plain]
    assert len({file.read_bytes() for file in files}) == 5
    asked = e.asked_by(e.MIXED, made, 8)
    assert asked == (
        *("plain-0", "plain-1", "milora-0", "milora-1"),
        *("mixlora-0", "mixlora-1", "gated-0", "gated-1"),
    )
    assert e.asked_by(e.MILORA, made, 3) == ("milora-0", "milora-1", "milora-0")
    assert e.asked_by(e.SHARED, made, 3) == ("plain-0",) * 3
    assert e.asked_by(e.BASE_COPY, made, 2) == (None, None)


def test_routes_of_different_prompts_differ(tenants):
    import torch

    import loramux

    base, made = tenants
    handle = loramux.load(base, made.milora[0])
    routes = set()
    with torch.no_grad():
        for start in range(8):
            base(torch.arange(start, start + 12).reshape(1, 12) * 7 % 96)
            gates = [tuple(record.weight.flatten().tolist()) for record in handle.routing()]
            routes.add(tuple(gates))
    handle.detach()
    assert len(routes) > 4  # two layers have few routes to choose from


def test_an_engine_that_does_not_compute_what_its_title_says_is_not_timed(tenants):
    base, made = tenants
    folders = by_name([*made.plain, *made.milora, *made.mixlora, *made.gated])
    reference = Reference(base, folders, 96)
    swapped = {**folders, "plain-0": folders["plain-1"]}
    engine = build_engine(base, swapped, batch=2, context=32)
    try:
        names = ("plain-1", "milora-0", "mixlora-0", "gated-0", None)
        reference.check(engine, "sound", names, most=len(names))
        with pytest.raises(RuntimeError, match="swapped: the answer with plain-0 is off"):
            reference.check(engine, "swapped", ("plain-0",))
    finally:
        engine.close()


def test_a_peer_that_ignores_an_adapter_is_not_timed(tenants):
    base, made = tenants
    setting = e.Setting(base, made, batch=3, context=8, steps=1)
    build = e.makers(setting)
    subjects = {name: build[name]() for name in (e.BARE, e.PEFT, e.ARROW)}
    e.check_peers(subjects)
    mixed = subjects[e.PEFT].model
    mixed.names[1] = "__base__"
    subjects[e.PEFT] = Decoder(mixed, make_prompt(3, 8, 96), 1)
    with pytest.raises(RuntimeError, match="PEFT mixed batch.*1 of 3 requests"):
        e.check_peers(subjects)


def test_a_missing_package_of_others_is_named_and_a_missing_one_of_ours_is_an_error():
    def needs(module):
        def make():
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        return make

    made, absent = line_up({"ours": lambda: 1, "theirs": needs("mixlora.config")})
    assert (made, absent) == ({"ours": 1}, {"theirs": "mixlora.config is not installed"})
    with pytest.raises(ModuleNotFoundError, match=r"loramux\.nothing"):
        line_up({"ours": needs("loramux.nothing")})


def test_peers_that_cannot_be_interleaved_are_named_with_the_reason(results):
    absent = results("decode")["absent"]
    for name, why in not_here().items():
        assert absent[name] == why and len(why) > 10
