"""Damaged files are refused with FormatError and nothing else: no crash, no hang, no half-read adapter."""

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formats.samples import adapter
from loramux.formats import FormatError
from loramux.formats.mixlora import read_mixlora
from loramux.formats.peft import read_peft, write_peft
from loramux.formats.tensors import AdapterTensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUICK = settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path, adapter())
    return tmp_path


def _read(folder: Path) -> AdapterTensors | None:
    try:
        return read_peft(folder)
    except FormatError:
        return None


@given(data=st.data())
@QUICK
def test_flipped_cut_and_inserted_bytes_of_the_weights(folder, data):
    original = (folder / WEIGHTS).read_bytes()
    damaged = bytearray(original)
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(damaged), header_end + 40) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if kind == "flip":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            damaged = damaged[: max(at, 1)]
        elif kind == "insert":
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif len(damaged) > 1:
            del damaged[at]
    (folder / WEIGHTS).write_bytes(bytes(damaged))
    try:
        _read(folder)
    finally:
        (folder / WEIGHTS).write_bytes(original)


@given(data=st.data())
@QUICK
def test_any_json_in_any_entry_of_the_header(folder, data):
    original = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", original[:8])[0]
    header = json.loads(original[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    value = data.draw(JSON)
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", None]))
    if field is None:
        header[data.draw(st.text(max_size=30)) if data.draw(st.booleans()) else name] = value
    else:
        header[name] = {**header[name], field: value}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + original[8 + length :])
    try:
        _read(folder)
    finally:
        (folder / WEIGHTS).write_bytes(original)


@given(data=st.data())
@QUICK
def test_any_json_in_any_field_of_the_config(folder, data):
    config = json.loads((folder / CONFIG).read_text())
    original = (folder / CONFIG).read_bytes()
    for _ in range(data.draw(st.integers(1, 2))):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(JSON)
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        _read(folder)
        with pytest.raises(FormatError):
            read_mixlora(folder)
    finally:
        (folder / CONFIG).write_bytes(original)


@given(text=st.binary(max_size=60))
@QUICK
def test_any_bytes_as_a_config_are_refused(folder, text):
    (folder / CONFIG).write_bytes(text)
    assert _read(folder) is None
