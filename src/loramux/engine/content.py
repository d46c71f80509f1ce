"""One adapter's content in memory: immutable, known by its digest, with no name and no folder.

Why: names move and folders are overwritten; answers under way must not notice. The digest covers what the adapter
computes: method, router settings, the rows of every site, magnitudes and router tensors; two names with one content
share everything.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter, key_of
from loramux.core.method import Method, MethodConfig
from loramux.core.router import Router
from loramux.core.types import Servability, Site
from loramux.engine.facts import Facts, find_facts
from loramux.engine.packing import Layout, Packed, SiteParts, pack
from loramux.formats.jsonio import canonical_json
from loramux.methods.lora import LoraMethod
from loramux.ops.pool import PackedRows
from loramux.persist.base import BaseIdentity
from loramux.persist.read import is_plain, lora_config, read_adapter, read_plain

# What is allocated (spans say it exactly) and where experts came from; all else in a config may steer a router.
_NOT_FUNCTION = frozenset({*(f.name for f in dataclasses.fields(MethodConfig)), "adapters"})


@dataclass(frozen=True, eq=False)
class Content:
    """What a request pins. `sites`: those it touches, in declared order; rows and routers are never written to."""

    digest: str
    method: Method
    layout: Layout
    sites: Mapping[str, Site]
    pack: Packed
    routers: Mapping[str, Router] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    mask: tuple[bool, ...] | None = None

    @property
    def packed(self) -> PackedRows:
        return self.pack.rows

    @property
    def num_slots(self) -> int:
        return int(self.packed.rank.shape[0])

    @property
    def slot_bytes(self) -> int:
        """What it takes in the slot tier."""
        size: int = self.packed.blob.numel()
        return size

    @cached_property
    def nbytes(self) -> int:
        """What it takes in the memory tier: rows, gains, magnitudes, routers and the kernels' copies of their gates."""
        routers = nn.ModuleDict({key_of(path): router for path, router in self.routers.items()})
        tensors = routers.state_dict().values()
        own = sum(int(t.numel() * t.element_size()) for t in tensors)
        return self.pack.nbytes + own + self.facts.gate_bytes

    @property
    def servability(self) -> Servability:
        return self.method.servability

    @property
    def is_chunkable(self) -> bool:
        """Whether its prompts may run in pieces: a router that reads the whole prompt forbids it."""
        return not any(router.when == "prompt" for router in self.routers.values())

    @property
    def is_shareable(self) -> bool:
        """Whether the KV of a prompt may serve another prompt with the same beginning."""
        return self.is_chunkable

    @cached_property
    def adapter(self) -> Adapter:
        """The core's view of it, rows as views of the blob; made when first asked for."""
        rows = {path: self.pack.rows_at(self.layout, path) for path in self.sites}
        adapter = Adapter(
            self.digest, self.method, self.sites, rows, self.routers, experts=self.experts
        )
        adapter.mask = self.mask
        return adapter

    @cached_property
    def facts(self) -> Facts:
        """What the engine looks up of its routers."""
        if self.routers:
            return find_facts(self.adapter, self.layout.sites)
        # Without routers there is nothing to look up, so hundreds of row modules need not be made.
        bare = find_facts(Adapter(self.digest, self.method, {}, {}, {}), self.layout.sites)
        return dataclasses.replace(bare, num_plain=self.num_slots)


def read_content(
    layout: Layout, model: nn.Module, base: BaseIdentity, folder: Path, check_base: bool = True
) -> Content:
    """Read and check a folder; raises FormatError or ValueError with the reader's message."""
    if is_plain(folder):
        content = _read_static(layout, base, folder, check_base)
    else:
        adapter = read_adapter(
            model, layout.sites, folder, "content", False, check_base=check_base, base=base
        )
        content = _content(layout, adapter, adapter.routers_by_key)
    _ = content.facts  # now, on the loader's thread, so that the engine's finds them made
    return content


def content_of(layout: Layout, adapter: Adapter) -> Content:
    """A copy of an adapter in memory: training it further changes nothing here."""
    unknown = [path for path in adapter.sites if path not in layout.index]
    if unknown:
        raise ValueError(
            f"adapter {adapter.name!r} has rows at {unknown[:3]}, which the engine's model does not have as sites; it "
            "was made for another base"
        )
    routers = copy.deepcopy(adapter.routers_by_key).cpu().requires_grad_(False)
    content = _content(layout, adapter, routers)
    _ = content.facts  # what a router cannot do shows now, not in a step
    return content


def _read_static(layout: Layout, base: BaseIdentity, folder: Path, check_base: bool) -> Content:
    """The short way for a PEFT folder: from the file's tensors into the blob, no module in between."""
    tensors, found, spans = read_plain(layout.sites, folder, base if check_base else None)
    sites = {
        path: SiteParts(
            spans[path],
            (entry := tensors.sites[path],),
            None if entry.magnitude is None else entry.magnitude.reshape(1, -1),
        )
        for path in found
    }
    packed = pack(layout, sites)
    method = LoraMethod(lora_config(tensors))
    return Content(_digest(method, packed, {}, None), method, layout, found, packed)


def _content(layout: Layout, adapter: Adapter, routers: nn.ModuleDict) -> Content:
    # Folded: gates over ranks are part of A, and experts that share an A have one each.
    parts = {path: SiteParts.of_rows(rows.folded()) for path, rows in adapter.rows.items()}
    packed = pack(layout, parts)
    own: dict[str, Router] = {}
    routers.eval()
    for path in adapter.routers:
        router = routers[key_of(path)]
        assert isinstance(router, Router)
        bind: Any = getattr(router, "bind", None)
        if bind is not None:  # a gate that reads t knows its rows: let it see the copy
            bind(packed.rows_at(layout, path))
        own[path] = router
    digest = _digest(adapter.method, packed, dict(routers.state_dict()), adapter.mask)
    return Content(
        digest, adapter.method, layout, adapter.sites, packed, own, adapter.experts, adapter.mask
    )


def _digest(
    method: Method,
    packed: Packed,
    routers: Mapping[str, Tensor],
    mask: tuple[bool, ...] | None,
) -> str:
    """SHA-256 over what the content computes, in one order for every engine over the same model."""
    config = method.config.to_dict()
    # However it was trained, what is static is the plain LoRA that its folder holds.
    is_plain_lora = not routers and method.servability == "static"
    named = {**packed.magnitudes, **{f"router {name}": routers[name] for name in sorted(routers)}}
    manifest = {
        "method": LoraMethod.name if is_plain_lora else method.name,
        "config": {
            key: value
            for key, value in config.items()
            if key not in _NOT_FUNCTION and not is_plain_lora
        },
        "mask": mask,
        "dtype": str(packed.rows.dtype),
        "sites": [[path, s.rank, s.scale] for path, s in packed.spans.items()],
        "tensors": [[name, str(t.dtype), list(t.shape)] for name, t in named.items()],
    }
    state = hashlib.sha256(canonical_json(manifest))
    state.update(packed.rows.blob[: packed.rows_bytes].numpy().data)
    for tensor in named.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()
