"""Builds what an engine is made of, in the one order that works, and takes it apart again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loramux.core.guards import check_bare
from loramux.core.sites import find_sites
from loramux.engine.attention import Paging
from loramux.engine.fusing import fuse_model, shortcut_children
from loramux.engine.graph import CudaCapture, DecodeGraphs, RunAgain, why_not_captured
from loramux.engine.kv import KVPool
from loramux.engine.probe import probe_model
from loramux.engine.runner import Runner
from loramux.engine.sizes import parse_bytes
from loramux.engine.store import AdapterStore
from loramux.engine.wiring import Wiring
from loramux.ops.arena import ArenaTable
from loramux.ops.slots import SlotTable
from loramux.ops.triton import is_interpreted
from loramux.persist.base import digest_of_base


@dataclass(eq=False)
class Parts:
    """All that depends on the model. `close` gives the model back unchanged."""

    model: nn.Module
    tokenizer: Any
    base_digest: str
    vocab: int
    max_length: int | None
    eos: frozenset[int]
    kv: KVPool
    store: AdapterStore
    runner: Runner
    undo: list[Callable[[], None]]
    no_graphs: str  # why decode steps are not captured; empty: they are

    def graph_stats(self) -> dict[str, Any]:
        """How many sizes of decode step were captured and how many steps replayed one; `off`: why none is."""
        graphs = self.runner.graphs
        return {
            "captured": 0 if graphs is None else graphs.captured,
            "replayed": 0 if graphs is None else graphs.replayed,
            "off": self.no_graphs,
        }

    def close(self) -> None:
        self.store.close()
        self.runner.close()
        _undo(self.undo)


def build_parts(
    base: Any,
    tokenizer: Any,
    *,
    dtype: str | None,
    kv_memory: int | str,
    adapter_memory: int | str,
    slot_memory: int | str,
    max_slots: int,
    block_size: int,
    fuse: bool,
    cuda_graphs: bool,
    check_base: bool,
) -> Parts:
    """Raises ValueError with the model as it was."""
    budgets = {
        "kv_memory": kv_memory,
        "adapter_memory": adapter_memory,
        "slot_memory": slot_memory,
    }
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    sizes = {name: parse_bytes(size, name) for name, size in budgets.items()}
    model, tokenizer = _load(base, tokenizer, dtype)
    check_bare(model)
    shape = probe_model(model)
    sites = find_sites(model)
    weight = next(model.parameters())
    num_blocks = KVPool.num_blocks_for(sizes["kv_memory"], shape.kv, block_size, weight.dtype)
    kv = KVPool(shape.kv, num_blocks, block_size, weight.dtype, weight.device)
    widths = [(site.d_in, site.d_out) for site in sites]
    table = SlotTable(widths, max_slots)
    if (
        weight.device.type != "cpu" or is_interpreted()
    ):  # rows are copied there, into room set aside
        table = ArenaTable(widths, max_slots, sizes["slot_memory"], weight.device)
    store = AdapterStore(
        model, sites, memory_bytes=sizes["adapter_memory"], slot_bytes=sizes["slot_memory"],
        max_slots=max_slots, table=table, check_base=check_base,
    )  # fmt: skip
    digest = digest_of_base(model)
    config: Any = model.config
    text = config.get_text_config()
    undo: list[Callable[[], None]] = []
    try:
        if fuse:
            undo.append(fuse_model(model))
        wiring = Wiring(model, sites, table, shape.groups, _head_of(model))
        undo.append(wiring.close)
        paging = Paging(model, shape, kv)
        undo.append(paging.close)
        if fuse:
            undo.append(shortcut_children(model))
        undo.append(_evaluating(model))
        runner = Runner(model, wiring, paging)
        max_length = getattr(text, "max_position_embeddings", None)
        no_graphs = why_not_captured(model, wiring) if cuda_graphs else "cuda_graphs is off"
        if not no_graphs:
            width = min(num_blocks, -(-(max_length or num_blocks * block_size) // block_size))
            capture = CudaCapture(weight.device) if weight.device.type == "cuda" else RunAgain()
            runner.graphs = DecodeGraphs(runner.forward, kv, len(sites), width, capture)
        parts = Parts(
            model=model,
            tokenizer=tokenizer,
            base_digest=digest,
            vocab=int(text.vocab_size),
            max_length=max_length,
            eos=_eos_of(model, tokenizer),
            kv=kv,
            store=store,
            runner=runner,
            undo=undo,
            no_graphs=no_graphs,
        )
    except BaseException:
        _undo(undo)
        raise
    return parts


def _evaluating(model: nn.Module) -> Callable[[], None]:
    """Dropout and the like are off while the engine serves; the function returned puts every module's mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()

    def undo() -> None:
        for module in training:
            module.training = True

    return undo


def _undo(steps: list[Callable[[], None]]) -> None:
    for step in reversed(steps):
        step()


def _load(base: Any, tokenizer: Any, dtype: str | None) -> tuple[nn.Module, Any]:
    if isinstance(base, nn.Module):
        if dtype is not None:
            raise ValueError("dtype is for a base given by name; cast the model before")
        return base, tokenizer
    if not isinstance(base, str | os.PathLike):
        raise ValueError(
            f"base must be a folder, a hub id, a name of `loramux fetch` or a model, got {type(base).__name__}"
        )
    from loramux.eval.loading import load_model

    loaded = load_model(os.fspath(base), dtype=dtype)
    return loaded.model, loaded.tokenizer if tokenizer is None else tokenizer


def _head_of(model: nn.Module) -> str | None:
    """Path of the output head, if it is a plain linear: the kernel serves it too."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if type(head) is not nn.Linear:
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _eos_of(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, as `generate` knows them, and the tokenizer's own."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        given = getattr(config, "eos_token_id", None)
        found |= {given} if isinstance(given, int) else set(given or ())
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(found if own is None else found | {own})
