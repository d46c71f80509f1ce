"""Retrieved LoRAs under a RouterLoRA that was trained once: any set of them becomes one adapter, without training.

Why here: the router of RAMoLE belongs to the linears of a base, not to the experts it was trained with, so its tensors
are taken out of the mixture they were saved in and put over the folders a retriever found. What it does depend on is
checked: the base it was trained on, and the linears it has tensors for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from loramux.core.adapter import Adapter, key_of
from loramux.core.sites import find_sites
from loramux.core.types import Site
from loramux.formats.errors import FormatError, listed
from loramux.formats.jsonio import canonical_json
from loramux.formats.mixture import is_mixture, read_mixture
from loramux.formats.peft import read_peft
from loramux.formats.tensors import AdapterTensors
from loramux.methods import config_from_dict
from loramux.methods.ramole import RAMoLEConfig, RAMoLEMethod
from loramux.persist.base import BaseIdentity
from loramux.persist.read import gate, is_plain
from loramux.persist.routers import load_routers

Folder = str | os.PathLike[str]
_LEAVES = ("A_r", "B_r")


@dataclass(frozen=True, eq=False)
class TrainedRouter:
    """A RouterLoRA without experts. `tensors`: as in router.safetensors; `digest` covers them and what they mean."""

    config: RAMoLEConfig
    tensors: Mapping[str, Tensor]
    digest: str
    base_digest: str | None
    base_name: str | None
    where: str

    def at(self, path: str) -> dict[str, Tensor]:
        """The two tensors of a linear; empty where it was not trained."""
        names = [f"{key_of(path)}.{leaf}" for leaf in _LEAVES]
        return {name: self.tensors[name] for name in names if name in self.tensors}

    @property
    def rank(self) -> int:
        return self.config.router_rank


def read_router(folder: Folder) -> TrainedRouter:
    """The router of a saved RAMoLE mixture; FormatError where the folder is something else."""
    folder = Path(folder)
    if not folder.is_dir() or not is_mixture(folder):
        raise FormatError(
            f"{folder} is not a saved mixture; give the folder of a trained RAMoLE (`loramux train` with method: "
            "{name: ramole, adapters: [...]})",
            code="not_a_router",
        )
    saved = read_mixture(folder, allow_zero=True)
    if saved.method != RAMoLEMethod.name:
        raise FormatError(
            f"{folder} holds a mixture of the method {saved.method!r}, whose router belongs to its own experts; only a "
            "RAMoLE router can be put over others",
            code="not_a_router",
        )
    config = config_from_dict({"name": saved.method, **saved.config})
    assert isinstance(config, RAMoLEConfig)
    # How it was trained is no part of what it does, and names experts of its own.
    bare = dataclasses.replace(config, adapters=(), train_set="all", retrieved={})
    apart = ("adapters", "train_set", "retrieved", "retrieved_k")
    meant = {key: value for key, value in bare.to_dict().items() if key not in apart}
    digest = hashlib.sha256(canonical_json([meant, saved.router_digest])).hexdigest()
    return TrainedRouter(
        bare, saved.router, digest, saved.base_digest, saved.base_name, str(folder)
    )


def pool_key(ids: Iterable[str], router: TrainedRouter) -> str:
    """SHA-256 hex of a set of experts under a router; the order they are given in does not matter."""
    return hashlib.sha256(canonical_json([router.digest, sorted(ids)])).hexdigest()


def pool_name(ids: Iterable[str], router: TrainedRouter) -> str:
    """A name for the set in a handle or an engine."""
    return f"{RAMoLEMethod.name}-{pool_key(ids, router)[:40]}"


def assemble(
    model: nn.Module,
    experts: Mapping[str, Folder],
    router: Folder | TrainedRouter,
    *,
    name: str | None = None,
    check_base: bool = True,
    sites: Sequence[Site] | None = None,
    base: BaseIdentity | None = None,
) -> Adapter:
    """Plain LoRA folders, by ids of the caller's, as experts under the trained router; the model is not touched.

    Experts stand in the order of their ids (`adapter.method.config.adapters`). `sites` and `base`: what is known of
    the model already, if its linears are replaced. Raises FormatError for another base, for a folder that is no plain
    LoRA, and for one that adapts a linear the router was not trained at.
    """
    router = router if isinstance(router, TrainedRouter) else read_router(router)
    ids = sorted(experts)
    if not ids:
        raise FormatError("no adapters to put under the router; retrieve at least one", code="none")
    sites = find_sites(model) if sites is None else sites
    own = (base or BaseIdentity(model)) if check_base else None
    if own is not None:
        own.check_digest(router.base_digest, router.base_name)
    config = dataclasses.replace(router.config, adapters=tuple(ids))
    tensors = {
        expert: _read(Path(experts[id_]), router, own)
        for id_, expert in zip(ids, config.names, strict=True)
    }
    adapter = gate(sites, RAMoLEMethod(config), tensors, name or pool_name(ids, router))
    kept = {key: tensor for path in adapter.sites for key, tensor in router.at(path).items()}
    load_routers(adapter, kept)
    adapter.set_trainable(False)
    return adapter.eval()


def _read(folder: Path, router: TrainedRouter, base: BaseIdentity | None) -> AdapterTensors:
    if not is_plain(folder):
        raise FormatError(
            f"{folder} is a mixture; RAMoLE weighs plain LoRA adapters (a PEFT folder each)",
            code="not_plain",
        )
    tensors = read_peft(folder)
    unknown = [path for path in tensors.sites if not router.at(path)]
    if unknown:
        raise FormatError(
            f"{folder} adapts {listed(unknown, 3)}, where the router in {router.where} was not trained; train the "
            "router over adapters with the same target_modules, or leave this one out",
            code="other_targets",
        )
    if base is not None:
        base.check_record(folder, tensors.sites)
    return tensors
