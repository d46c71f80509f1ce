"""Contents: what a folder or an adapter becomes, and what its digest depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loramux
from conformance.cases import Maker, Variant, every_variant, named, nudge
from engine.folders import CONFIG, TARGETS, WEIGHTS, trained, write_lora
from loramux.core.bank import dora_gain
from loramux.core.sites import find_sites
from loramux.engine.content import Content, content_of, read_content
from loramux.engine.packing import ALIGN, Layout
from loramux.formats.errors import OTHER_BASE, FormatError
from loramux.ops.pool import SlotTable
from loramux.persist import base, digest_of_base, read_adapter
from loramux.persist.base import BaseIdentity
from pico import build_pico


class Reader:
    """Reads folders for one model."""

    def __init__(self, model: nn.Module):
        self.model, self.sites = model, find_sites(model)
        self.layout, self.base = Layout(model, self.sites), BaseIdentity(model)

    def __call__(self, folder: Path) -> Content:
        return read_content(self.layout, self.model, self.base, folder)

    def table_with(self, content: Content) -> SlotTable:
        """A table with the content in slots 1, 2, ..."""
        table = SlotTable([(s.d_in, s.d_out) for s in self.sites], content.num_slots + 1)
        table.put(range(1, content.num_slots + 1), content.packed)
        return table


@pytest.fixture
def read() -> Reader:
    return Reader(build_pico("llama"))


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Variant], tuple[loramux.Handle, Path]]:
    """A trained variant on a pico Llama, and the folder it was saved to."""
    root = tmp_path_factory.mktemp("contents")
    make, found = Maker(root / "experts"), {}

    def saved_as(variant: Variant) -> tuple[loramux.Handle, Path]:
        if variant.name not in found:
            handle = make.attach(build_pico("llama"), variant)
            found[variant.name] = handle, handle.save(root / variant.name)
        return found[variant.name]

    return saved_as


Saved = Callable[[Variant], tuple[loramux.Handle, Path]]
ALL = pytest.mark.parametrize("variant", every_variant(), ids=named)


@ALL
def test_slots_hold_the_rows_that_the_reader_reads(
    variant: Variant, saved: Saved, read: Reader
) -> None:
    _, folder = saved(variant)
    content = read(folder)
    table = read.table_with(content)
    adapter = read_adapter(read.model, read.sites, folder, "x", False, True)
    for i, site in enumerate(read.sites):
        rows = adapter.rows[site.path].folded() if site.path in adapter.rows else None
        for slot in range(content.num_slots):
            a, b, gain, scale = table.rows_of(1 + slot, i)
            if rows is None or slot >= rows.spans.num_slots:
                assert a.shape[0] == b.shape[0] == 0
                continue
            own = rows.slot_rows(slot)
            assert torch.equal(a, rows.a[own])
            assert torch.equal(b, rows.b[own])
            assert scale == pytest.approx(rows.spans.scale[slot])
            if rows.magnitude is None:
                assert gain is None
            else:
                weight = read.layout.weight_OI(site)
                torch.testing.assert_close(gain, dora_gain(rows, weight)[slot], rtol=0, atol=0)


@ALL
def test_the_view_for_the_core_has_the_same_rows_and_routers(
    variant: Variant, saved: Saved, read: Reader
) -> None:
    _, folder = saved(variant)
    content = read(folder)
    adapter = read_adapter(read.model, read.sites, folder, "x", False, True)
    view = content.adapter
    assert list(view.rows) == list(adapter.rows)
    assert view.experts == adapter.experts
    for path, rows in ((path, rows.folded()) for path, rows in adapter.rows.items()):
        assert view.rows[path].spans == rows.spans
        assert torch.equal(view.rows[path].a, rows.a)
        assert torch.equal(view.rows[path].b, rows.b)
        if rows.magnitude is not None:
            assert view.rows[path].magnitude is not None
            assert torch.equal(view.rows[path].magnitude, rows.magnitude)
    own, theirs = view.routers_by_key.state_dict(), adapter.routers_by_key.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    blob = content.packed.blob
    begin = blob.data_ptr()
    for rows in view.rows.values():
        assert begin <= rows.a.data_ptr() < begin + blob.numel(), "rows were copied"


@ALL
def test_an_adapter_in_memory_and_its_folder_are_one_content(
    variant: Variant, saved: Saved, read: Reader
) -> None:
    handle, folder = saved(variant)
    given = content_of(read.layout, handle.adapters["default"])
    assert given.digest == read(folder).digest
    assert given.nbytes == read(folder).nbytes


@ALL
def test_another_folder_with_the_same_files_is_the_same_content(
    variant: Variant, saved: Saved, read: Reader, tmp_path: Path
) -> None:
    _, folder = saved(variant)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere").digest == read(folder).digest


@ALL
def test_moving_any_one_tensor_of_an_adapter_makes_another_content(
    variant: Variant, read: Reader, make_variant: Maker
) -> None:
    handle = make_variant.attach(build_pico("llama"), variant)
    adapter = handle.adapters["default"]
    adapter.set_trainable(True)
    tensors = list(adapter.parameters())
    seen = {content_of(read.layout, adapter).digest}
    for tensor in [*tensors[:3], *tensors[-3:]]:
        with torch.no_grad():
            tensor.view(-1)[-1] += 0.5
        seen.add(content_of(read.layout, adapter).digest)
    assert len(seen) == 1 + len([*tensors[:3], *tensors[-3:]])


@pytest.fixture(scope="module")
def make_variant(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("moved"))


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("milora", {"top_k": 3}),
        ("milora", {"gate": "prob"}),
        ("mixlora", {"top_k": 3}),
        ("mixlora", {"routing_strategy": "mixlora-dynamic"}),
    ],
)
def test_how_a_router_decides_is_part_of_the_content(
    method: str, change: dict[str, Any], saved: Saved, read: Reader, tmp_path: Path
) -> None:
    variant = next(v for v in every_variant() if v.method == method)
    _, folder = saved(variant)
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed" / "mixture_config.json"
    header = json.loads(path.read_text())
    header["config"].update(change)
    path.write_text(json.dumps(header))
    assert read(tmp_path / "changed").digest != read(folder).digest


def test_scale_rank_and_targets_are_part_of_the_content(read: Reader, tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{}, {"alpha": 5.0}, {"r": 3}, {"targets": TARGETS[:2]}]
    folders = [write_lora(read.model, tmp_path / str(i), **kw) for i, kw in enumerate(given)]
    assert len({read(folder).digest for folder in folders}) == len(folders)


def test_what_only_training_reads_is_not(read: Reader, tmp_path: Path) -> None:
    folders = [write_lora(read.model, tmp_path / name) for name in ("plain", "dropout")]
    path = folders[1] / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.1}))
    assert read(folders[0]).digest == read(folders[1]).digest


def test_a_masked_expert_makes_another_content(saved: Saved, read: Reader) -> None:
    handle, folder = saved(next(v for v in every_variant() if v.method == "mole"))
    handle.mask_experts({"red": False})
    try:
        content = content_of(read.layout, handle.adapters["default"])
    finally:
        handle.mask_experts(None)
    assert content.mask == (False, True, True)
    assert content.adapter.mask == content.mask
    assert content.digest != read(folder).digest


def test_training_an_adapter_further_does_not_reach_its_content(read: Reader) -> None:
    handle = trained(build_pico("llama"))
    adapter = handle.adapters["default"]
    content = content_of(read.layout, adapter)
    before = content.packed.blob.clone()
    nudge(adapter, 5)
    assert torch.equal(content.packed.blob, before)
    assert content_of(read.layout, adapter).digest != content.digest


def test_training_a_router_further_does_not_reach_its_content(
    read: Reader, make_variant: Maker
) -> None:
    variant = next(v for v in every_variant() if v.method == "mixlora")
    adapter = make_variant.attach(build_pico("llama"), variant).adapters["default"]
    content = content_of(read.layout, adapter)
    path, router = next(iter(content.routers.items()))
    before = router.get_parameter("weight").clone()
    nudge(adapter, 5)
    assert torch.equal(router.get_parameter("weight"), before)
    assert router is not adapter.routers[path]
    assert not router.get_parameter("weight").requires_grad


def test_half_precision_rows_become_fp32_exactly_and_bfloat16_stays(
    read: Reader, tmp_path: Path
) -> None:
    half = write_lora(read.model, tmp_path / "half", dtype=torch.float16)
    wide = shutil.copytree(half, tmp_path / "wide")
    tensors = {name: t.float() for name, t in load_file(half / WEIGHTS).items()}
    save_file(tensors, wide / WEIGHTS, metadata={"format": "pt"})
    short = write_lora(read.model, tmp_path / "bf16", dtype=torch.bfloat16)
    assert read(half).packed.dtype is torch.float32
    assert read(half).digest == read(wide).digest
    assert read(short).packed.dtype is torch.bfloat16
    assert read(short).nbytes < read(half).nbytes


def test_an_adapter_of_mixed_dtypes_is_widened(read: Reader, tmp_path: Path) -> None:
    folder = write_lora(read.model, tmp_path / "mixed", dtype=torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    first = sorted(tensors)[0]
    save_file({**tensors, first: tensors[first].float()}, folder / WEIGHTS)
    assert read(folder).packed.dtype is torch.float32


def test_sites_that_read_one_input_lie_side_by_side(read: Reader, tmp_path: Path) -> None:
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    content = read(write_lora(read.model, tmp_path / "a", targets=targets))
    rows = content.packed
    q, k, v, o = (
        next(i for i, s in enumerate(read.sites) if s.layer == 0 and s.name.endswith(name))
        for name in targets
    )
    size = 4 * 2 * 32  # fp32, rank, width
    assert rows.a_at[0, k] == rows.a_at[0, q] + size
    assert rows.a_at[0, v] == rows.a_at[0, k] + size
    assert rows.b_at[0, q] >= rows.a_at[0, v] + size
    assert rows.b_at[0, k] == rows.b_at[0, q] + 4 * 2 * read.sites[q].d_out
    assert rows.a_at[0, o] > rows.b_at[0, v]
    assert all(rows.a_at[0, i] % ALIGN == 0 for i in (q, o))


def test_prompt_routed_contents_are_neither_cut_nor_shared(saved: Saved, read: Reader) -> None:
    whole = {v.name: read(saved(v)[1]) for v in every_variant()}
    cut = {name for name, content in whole.items() if not content.is_chunkable}
    routed = {v.name for v in every_variant() if v.method in ("milora", "midora", "moelora")}
    assert cut == routed | {"mole-prompt"}
    assert cut == {name for name, content in whole.items() if not content.is_shareable}


@ALL
def test_what_the_engine_looks_up_is_there(variant: Variant, saved: Saved, read: Reader) -> None:
    content = read(saved(variant)[1])
    facts = content.facts
    assert facts.routes_on_prompt == (not content.is_chunkable)
    assert bool(facts.blocks) == (variant.method in ("mixlora", "mixdora"))
    assert bool(facts.late) == (variant.method == "mole")
    assert 1 <= facts.num_plain <= content.num_slots


def test_an_adapter_of_another_base_is_refused(read: Reader) -> None:
    handle = trained(build_pico("gpt2"))
    with pytest.raises(ValueError, match="was made for another base"):
        content_of(read.layout, handle.adapters["default"])


def test_dora_over_a_quantised_base_is_refused(tmp_path: Path) -> None:
    handle = trained(build_pico("llama"), use_dora=True)
    model = build_pico("llama")
    folder = handle.save(tmp_path / "dora")
    (folder / "loramux.json").unlink()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="DoRA needs the norms of the base's weights"):
        Reader(model)(folder)


def test_the_base_of_every_folder_is_checked(tmp_path: Path) -> None:
    folder = trained(build_pico("llama", seed=1)).save(tmp_path / "other")
    with pytest.raises(FormatError, match="was trained on another base") as caught:
        Reader(build_pico("llama"))(folder)
    assert caught.value.code == OTHER_BASE


@pytest.mark.parametrize("change", ["no such site", "another shape"])
def test_what_the_base_has_no_room_for_is_told_to_be_of_another_base(
    tmp_path: Path, change: str
) -> None:
    """Folders of other tools note no base; the code is what a server goes by."""
    folder = trained(build_pico("llama")).save(tmp_path / "foreign")
    (folder / "loramux.json").unlink()
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        if change == "another shape":
            tensors[name] = torch.cat(
                [tensors[name], tensors[name]], dim=-1 if "lora_A" in name else 0
            )
        elif ".layers.1." in name:
            tensors[name.replace(".layers.1.", ".layers.7.")] = tensors.pop(name)
    save_file(tensors, file)
    with pytest.raises(FormatError, match="trained on another base") as caught:
        Reader(build_pico("llama"))(folder)
    assert caught.value.code == OTHER_BASE


def test_the_base_is_known_though_its_linears_were_replaced_since(tmp_path: Path) -> None:
    folder = trained(build_pico("llama"), use_dora=True).save(tmp_path / "own")
    other = trained(build_pico("llama", seed=1)).save(tmp_path / "other")
    read = Reader(build_pico("llama"))
    before = read(folder)
    loramux.attach(read.model, loramux.LoraConfig(r=2))
    assert torch.equal(read(folder).packed.blob, before.packed.blob)
    with pytest.raises(ValueError, match="was trained on another base"):
        read(other)


def test_the_base_is_digested_once_for_all_mixtures(
    saved: Saved, read: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests: list[str] = []

    def counted(model: nn.Module) -> str:
        digests.append(digest_of_base(model))
        return digests[-1]

    inner = base.state_digest
    monkeypatch.setattr(base, "digest_of_base", counted)
    monkeypatch.setattr(
        base, "state_digest", lambda *args: digests.append(inner(*args)) or digests[-1]
    )
    for variant in every_variant():
        read(saved(variant)[1])
    assert len(digests) == 1


@pytest.mark.parametrize("family", ["gpt2", "phi3", "qwen3"])
def test_contents_fit_models_of_other_families(family: str, tmp_path: Path) -> None:
    model = build_pico(family)
    handle = trained(model, use_dora=True)
    folder = handle.save(tmp_path / family)
    digest = content_of(Reader(build_pico(family)).layout, handle.adapters["default"]).digest
    assert Reader(build_pico(family))(folder).digest == digest
