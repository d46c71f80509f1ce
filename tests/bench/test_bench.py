"""The instrument end to end on a tiny shape: rows, schema, picture; nothing here looks at the numbers."""

import json
from contextlib import closing, nullcontext
from dataclasses import replace

import pytest
import torch

from bench.efforts import PICO, TINY
from loramux.bench import joint
from loramux.bench import subjects as s
from loramux.bench.adapters import save_adapters
from loramux.bench.apart import Apart
from loramux.bench.decode import Decoder, check_outputs
from loramux.bench.load import FIRST, FURTHER
from loramux.bench.memory import memory_rows, peak_in_a_process
from loramux.bench.plot import save_chart
from loramux.bench.progress import silent
from loramux.bench.run import bench
from loramux.bench.shape import build_base, copy_of, one_thread, twin_of
from loramux.bench.table import TARGETS
from loramux.errors import LoramuxError

KEYS = ("what", "variant", "reference", "batch", "adapters", "ratio", "low", "high", "target")


@pytest.fixture(scope="module")
def decoded():
    return bench("decode", part="models", effort=TINY, show_progress=False)


class Here:
    """A subject that is not apart, but for the first: each start of a process costs more than all that it measures."""

    def __init__(self):
        self.apart = 0

    def __call__(self, make, *args):
        if not self.apart:
            self.apart += 1
            return Apart(make, *args)
        measure = make(*args)
        return closing(measure) if hasattr(measure, "close") else nullcontext(measure)


@pytest.fixture(scope="module")
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "Apart", Here())
        return bench("train", effort=TINY, show_progress=False)


@pytest.fixture
def folders(tmp_path):
    base = build_base(PICO)
    return base, save_adapters(base, tmp_path)


def find(result, what, variant, reference, batch):
    (row,) = [
        row
        for row in result["rows"]
        if (row["what"], row["variant"], row["reference"], row["batch"])
        == (what, s.TITLES.get(variant, variant), s.TITLES.get(reference, reference), batch)
    ]
    return row


@pytest.mark.parametrize("name", ["decoded", "trained"])
def test_every_row_has_the_agreed_keys_and_survives_json(name, request):
    result = json.loads(json.dumps(request.getfixturevalue(name)))
    assert result["rounds"] == (3 if name == "decoded" else 2)
    for row in result["rows"]:
        assert tuple(row)[: len(KEYS)] == KEYS
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert row["verdict"] in ("met", "missed", "open", "control", "")
    assert any(row["verdict"] == "control" for row in result["rows"])
    machine = result["machine"]
    assert machine["threads"] == 1
    assert {"cpu", "flags", "torch", "transformers", "peft", "kernel", "backends"} <= machine.keys()
    assert machine["backends"]


def test_decode_compares_what_has_a_target_with_a_control_beside_it(decoded):
    for batch in TINY.batches:
        for variant, reference, target in [
            (s.LORA, s.BARE, "lora/bare"),
            (s.LORA_FP32, s.BARE, "lora/bare"),
            (s.LORA, s.PEFT, "lora/peft"),
            (s.LORA_FP32, s.PEFT_FP32, "lora/peft"),
        ]:
            row = find(decoded, "decode", variant, reference, batch)
            assert row["target"] == TARGETS[target]
        find(decoded, "control", s.BARE_COPY, s.BARE, batch)
    assert find(decoded, "decode", s.MIXLORA, s.BARE, 1)["target"] == TARGETS["mixlora/bare"]
    assert find(decoded, "decode", s.MIXLORA, s.BARE, 2)["target"] is None
    close = find(decoded, "decode, one base", s.MILORA, s.LORA, 1)
    assert (close["target"], close["rounds"]) == (1.0, 4)
    find(decoded, "control, one base", s.LORA_COPY, s.LORA, 1)


def test_loading_is_timed_on_both_clocks_and_has_its_target_in_milliseconds():
    result = bench("load", part="models", effort=TINY, show_progress=False)
    assert [row["reference"] for row in result["rows"]] == [FIRST, FURTHER]
    for row in result["rows"]:
        assert (row["target"], row["target_ms"]) == (None, 60)
        assert row["ms"] > 0 and row["wall_ms"] > 0


def test_training_compares_with_peft_and_with_a_second_peft(trained):
    step = [row for row in trained["rows"] if row["what"] == "training step"]
    assert len(step) == 3
    assert [row["target"] for row in step] == [TARGETS["mixlora step/peft"], None, None]
    assert sum(row["what"] == "control" for row in trained["rows"]) == 1


def test_memory_is_measured_in_a_process_of_its_own():
    assert 0 < peak_in_a_process("mixlora", TINY, None) < 1000


def test_memory_is_compared_with_peft_with_and_without_checkpointing():
    megabytes = {"peft": 100, "lora": 90, "milora": 95, "mixlora": 120}
    megabytes |= {"peft checkpointed": 50, "mixlora checkpointed": 60}
    asked = []

    def peak(kind, effort, folder):
        asked.append((kind, folder))
        return float(megabytes[kind])

    rows = memory_rows(replace(TINY, memory_runs=2), "base", silent, peak)
    assert sorted(asked) == sorted([(kind, "base") for kind in megabytes] * 2)
    assert [row.found.value for row in rows] == [0.9, 0.95, 1.2, 1.2]
    mixlora = rows[2]
    assert mixlora.target == TARGETS["mixlora memory/peft"] and mixlora.verdict == "met"
    assert (mixlora.extra["mb"], mixlora.extra["reference_mb"]) == (120.0, 100.0)
    assert rows[3].variant.endswith("gradient checkpointing") and rows[3].target is None


def test_a_missing_package_is_listed_and_not_measured(decoded):
    if s.PACKAGE in decoded["absent"]:
        assert "not installed" in decoded["absent"][s.PACKAGE]
        assert not any(s.TITLES[s.PACKAGE] == row["variant"] for row in decoded["rows"])


def test_quick_rows_settle_nothing():
    result = bench("train", effort=replace(TINY, is_quick=True), show_progress=False)
    assert result["quick"]
    assert {row["verdict"] for row in result["rows"]} == {"quick"}
    assert not any(row["resolved"] for row in result["rows"])


def test_another_measurement_is_refused():
    with pytest.raises(LoramuxError, match="'prefil'; did you mean 'prefill'"):
        bench("prefil")
    with pytest.raises(LoramuxError, match="train has no part 'engine'; allowed: models"):
        bench("train", part="engine")


@pytest.mark.parametrize("name", ["decoded", "trained"])
def test_the_picture_is_a_png(name, request, tmp_path):
    path = save_chart(request.getfixturevalue(name), tmp_path / "rows.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_decoding_returns_to_the_same_context(folders):
    base, _ = folders
    decoder = Decoder(base, torch.arange(6).reshape(1, 6), steps=3)
    first = decoder.step(0)
    decoder.rewind(1)
    for _ in range(3):
        assert decoder() > 0
        assert decoder.cache.get_seq_length() == 6
    assert torch.equal(decoder.step(0), first)


def test_subjects_that_do_not_compute_what_they_say_are_not_timed(folders):
    base, saved = folders
    lineup = s.line_up(base, saved, lambda: None)
    prompt = torch.arange(8).reshape(1, 8)
    decoders = {name: Decoder(model, prompt, 1) for name, model in lineup.models.items()}
    check_outputs(decoders)
    idle = {**decoders, s.MILORA: decoders[s.BARE_COPY]}
    with pytest.raises(RuntimeError, match="MiLoRA .* the bare model's outputs"):
        check_outputs(idle)
    mixed_up = {**decoders, s.PEFT: decoders[s.MIXLORA]}
    with pytest.raises(RuntimeError, match="PEFT.* differ"):
        check_outputs(mixed_up)


def test_saving_the_adapters_leaves_the_base_as_it_was(folders):
    base, saved = folders
    fresh = build_base(PICO)
    assert all(
        torch.equal(p, q) for p, q in zip(base.parameters(), fresh.parameters(), strict=True)
    )
    assert {p.name for p in saved.lora.iterdir()} >= {"adapter_config.json"}


def test_a_copy_owns_its_weights_and_a_twin_shares_them():
    base = build_base(PICO)
    (weight,) = [p for n, p in base.named_parameters() if n.endswith("layers.0.mlp.up_proj.weight")]
    path = "model.layers.0.mlp.up_proj"
    copied = copy_of(base).get_submodule(path).weight
    assert torch.equal(copied, weight) and copied.data_ptr() != weight.data_ptr()
    twin = twin_of(base)
    assert twin.get_submodule(path).weight is weight
    assert twin.get_submodule(path) is not base.get_submodule(path)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
