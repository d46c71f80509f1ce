"""What a folder says about rows and routers: shared A, one folder of ranks, buffers; and what it may not say."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loramux
from loramux.core.adapter import Adapter
from loramux.core.bank import Rows
from loramux.formats.errors import FormatError
from loramux.formats.peft import read_peft
from loramux.ops.contract import Spans
from loramux.persist.routers import load_routers, router_tensors
from loramux.persist.rows import joined_row_tensors, row_tensors
from pico import build_pico

IDS = torch.tensor([[5, 17, 40, 61, 8, 29]])


def hydra() -> tuple[nn.Module, loramux.Handle]:
    model = build_pico("llama")
    config = loramux.HydraLoRAConfig(r=3, num_experts=4, lora_dropout=0.0)
    handle = loramux.attach(model, config, backend="reference")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in handle.trainable_parameters().values():
            parameter.normal_(std=0.2, generator=draw)
    return model, handle


def test_a_shared_a_is_in_every_experts_folder_and_kept_once_in_memory(tmp_path: Path):
    model, handle = hydra()
    folder = handle.save(tmp_path / "mixture")
    names = sorted(path.name for path in (folder / "experts").iterdir())
    assert names == [f"expert_{i}" for i in range(4)]
    path, rows = next(iter(handle.adapters["default"].rows.items()))
    for name in names:
        entry = read_peft(folder / "experts" / name).sites[path]
        assert torch.equal(entry.a, rows.a.detach())
    loaded = loramux.load(build_pico("llama"), folder, backend="reference", trainable=True)
    for path, again in loaded.adapters["default"].rows.items():
        own = handle.adapters["default"].rows[path]
        assert again.tied == own.tied == 4 and again.a.shape[0] == 3
        assert torch.equal(again.a, own.a) and torch.equal(again.b, own.b)
    assert list(loaded.trainable_parameters()) == list(handle.trainable_parameters())
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, model(IDS).logits)


def test_experts_whose_a_differ_are_refused_where_they_should_share_one(tmp_path: Path):
    _, handle = hydra()
    folder = handle.save(tmp_path / "mixture")
    path = folder / "experts" / "expert_2" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    tensors[key][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    header = json.loads((folder / "mixture_config.json").read_text())
    header["experts"][2]["digest"] = read_peft(path.parent).digest
    (folder / "mixture_config.json").write_text(json.dumps(header))
    with pytest.raises(FormatError, match="share one"):
        loramux.load(build_pico("llama"), folder)


# -- one folder for all ranks --------------------------------------------------------------------


def rows_of(ranks: list[int], scales: list[float]) -> Rows:
    spans = Spans.packed(ranks, scales)
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(spans.num_rows, 5, generator=draw)
    return Rows(spans, a, torch.randn(spans.num_rows, 4, generator=draw))


def test_ranks_of_one_scale_join_in_the_order_of_their_slots():
    rows = rows_of([1, 0, 2], [0.5, 9.0, 0.5])
    rows.spans = Spans(start=(2, 0, 0), rank=(1, 0, 2), scale=(0.5, 9.0, 0.5))
    joined = joined_row_tensors(rows, "q_proj")
    assert joined is not None
    entry, scale = joined
    assert scale == 0.5
    assert torch.equal(entry.a, rows.a.detach()[[2, 0, 1]])
    assert torch.equal(entry.b, rows.b.detach()[[2, 0, 1]])


def test_ranks_of_several_scales_do_not_fit_into_one_folder():
    with pytest.raises(ValueError, match=r"q_proj have several scales .*\[0.5, 2.0\]"):
        joined_row_tensors(rows_of([1, 1], [0.5, 2.0]), "q_proj")


def test_rows_without_a_rank_are_left_out():
    assert joined_row_tensors(rows_of([0, 0], [1.0, 1.0]), "q_proj") is None
    assert row_tensors(rows_of([0, 2], [1.0, 1.0]))[0] is None


class Gate(nn.Module):
    def __init__(self, factor_R: Tensor):
        super().__init__()
        self.factor_R = nn.Parameter(factor_R)

    def forward(self) -> Tensor:
        return self.factor_R


def test_gated_rows_are_saved_folded():
    rows = rows_of([2], [1.0])
    rows.gate = Gate(torch.tensor([2.0, -0.5]))
    (entry,) = row_tensors(rows)
    assert entry is not None
    assert torch.equal(entry[0].a, rows.a.detach() * torch.tensor([[2.0], [-0.5]]))
    assert torch.equal(entry[0].b, rows.b.detach())


# -- routers -------------------------------------------------------------------------------------


class Counting(loramux.Router):
    scope = "site"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("bias", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def with_router() -> Adapter:
    method = loramux.load_method("lora")(loramux.LoraConfig())
    adapter = Adapter("a", method, {}, {}, {})
    adapter.routers_by_key["q"] = Counting()
    return adapter


def test_buffers_are_part_of_a_router_unless_they_say_otherwise():
    source, target = with_router(), with_router()
    source.routers_by_key["q"].get_buffer("bias").fill_(0.25)
    state = router_tensors(source)
    assert list(state) == ["q.weight", "q.bias"]
    load_routers(target, {**state, "q.weight": torch.full((2,), 3.0)})
    assert target.routers_by_key["q"].get_buffer("bias").tolist() == [0.25, 0.25]
    assert target.routers_by_key["q"].get_parameter("weight").tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q.bias": torch.zeros(3)}, r"q.bias is torch.float32 \(3,\), expected .* \(2,\)"),
        ({"q.bias": torch.zeros(2, dtype=torch.long)}, "q.bias is torch.int64"),
        ({"q.weight": torch.zeros(2, dtype=torch.bool)}, "q.weight is torch.bool"),
        ({"q.scratch": torch.zeros(3)}, r"unexpected \['q.scratch'\]"),
    ],
)
def test_router_tensors_of_another_kind_are_refused(change: dict[str, Tensor], message: str):
    state = {**router_tensors(with_router()), **change}
    target = with_router()
    with pytest.raises(FormatError, match=message):
        load_routers(target, state)
    assert target.routers_by_key["q"].get_parameter("weight").tolist() == [1.0, 1.0]
