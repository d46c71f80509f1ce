"""Adapter folders for the store's tests: small, quick to write, each with rows of its own."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import loramux
from conformance.cases import nudge
from loramux.core.sites import find_sites
from loramux.engine.content import Content
from loramux.engine.store import AdapterStore, Lease, Ticket
from loramux.formats.scaling import peft_config
from loramux.ops.pool import SlotTable

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Stores = Callable[..., AdapterStore]
Folders = Callable[[int], Path]
TARGETS = ("q_proj", "v_proj", "down_proj")


def write_lora(
    model: nn.Module,
    folder: Path,
    seed: int = 0,
    *,
    r: int = 2,
    alpha: float = 4.0,
    targets: tuple[str, ...] = TARGETS,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A PEFT folder with random rows; replaces what is there, each file in one step."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in find_sites(model):
        if site.name.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{site.path}"
            a, b = (
                torch.randn(r, site.d_in, generator=draw),
                torch.randn(site.d_out, r, generator=draw),
            )
            tensors[f"{prefix}.lora_A.weight"] = a.to(dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f".{WEIGHTS}", metadata={"format": "pt"})
    os.replace(folder / f".{WEIGHTS}", folder / WEIGHTS)
    config = peft_config(r, alpha, target_modules=list(targets))
    (folder / f".{CONFIG}").write_text(json.dumps(config))
    os.replace(folder / f".{CONFIG}", folder / CONFIG)
    return folder


def trained(model: PreTrainedModel, seed: int = 0, **config: Any) -> loramux.Handle:
    """A LoRA attached to the model and moved off its start; detach it when done."""
    torch.manual_seed(seed)
    handle = loramux.attach(model, loramux.LoraConfig(**{"r": 2, **config}))
    nudge(handle.adapters["default"], seed)
    return handle


def first_row(folder: Path) -> torch.Tensor:
    """A row of A as the file has it: which version of an adapter this is."""
    tensors = load_file(folder / WEIGHTS)
    return tensors[sorted(tensors)[0]][0]


def make_store(
    model: nn.Module, *, memory: int = 2**24, slots: int = 8, slot_bytes: int = 2**24
) -> AdapterStore:
    sites = find_sites(model)
    table = SlotTable([(site.d_in, site.d_out) for site in sites], slots)
    return AdapterStore(
        model, sites, memory_bytes=memory, slot_bytes=slot_bytes, max_slots=slots, table=table
    )


def wait_for(store: AdapterStore, ticket: Ticket) -> str:
    """The state a ticket comes to rest in; `loading` where nothing is being read and what was read finds no room."""
    intake = store._intake
    while ticket.state == "loading" and intake._running is not None and intake._tried is None:
        assert store.wait(20.0), "nothing was read"
    return ticket.state


def lease_of(store: AdapterStore, *mix: tuple[str, float] | str) -> Lease:
    """Want these, wait, lease."""
    parts = tuple((part, 1.0) if isinstance(part, str) else part for part in mix)
    ticket = store.want(parts)
    while ticket.state == "loading":
        assert store.wait(20.0), "nothing was read"
    assert ticket.state == "ready", ticket.error
    lease = store.lease(ticket)
    assert lease is not None, "no slots are free"
    return lease


def row_of(store: AdapterStore, lease: Lease) -> Tensor:
    """The row that `first_row` reads from a file, out of the slots of a lease's only part."""
    (part,) = lease.parts
    site = min(part.content.sites)
    a, *_ = store.slots.table.rows_of(part.slots[0], store.layout.index[site])
    return a[0]


def size_of(store: AdapterStore, folder: Path) -> int:
    return store._read(folder).nbytes


class Gate:
    """Lets a store's loader read only when told to."""

    def __init__(self, store: AdapterStore):
        self.go, self.begun = threading.Event(), threading.Event()
        self.read: list[str] = []
        inner = store._intake._loader._read

        def read(folder: Path) -> Content:
            self.begun.set()
            assert self.go.wait(20)
            self.read.append(folder.name)
            return inner(folder)

        store._intake._loader._read = read


def truncate(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 100)
