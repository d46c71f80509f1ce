"""`attach` and `load`: a model and a method become a handle.

Everything is built and checked before the model changes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from loramux import persist
from loramux.core.adapter import Adapter
from loramux.core.attach import Attachment
from loramux.core.bank import Rows, fresh_rows, weight_norm
from loramux.core.guards import check_bare, check_name
from loramux.core.method import Method, MethodConfig
from loramux.core.sites import find_sites, refuse_fused_experts, select_sites
from loramux.core.types import Site
from loramux.methods import load_method

log = logging.getLogger(__name__)
DEFAULT_NAME = "default"
_WRITERS = {
    "own": persist.write_adapter,
    "mixlora": persist.write_published_mixlora,
    "moe-peft": persist.write_gated,
}


class Handle(Attachment):
    """A model with adapters attached: add, load, choose, save and remove them; `detach` restores the model."""

    def add(self, config: MethodConfig, name: str = DEFAULT_NAME) -> Adapter:
        """Attach a new adapter, ready to train."""
        self._check_attached()
        check_name(name)
        adapter = new_adapter(self.model, list(self.sites.values()), config, name)
        self.put(adapter)
        return adapter

    def load(
        self,
        folder: str | os.PathLike[str],
        name: str | None = None,
        *,
        trainable: bool = False,
        check_base: bool = True,
    ) -> Adapter:
        """Attach a saved adapter or mixture. `trainable` resumes training from it."""
        self._check_attached()
        adapter = persist.read_adapter(
            self.model, list(self.sites.values()), Path(folder), name, trainable, check_base
        )
        self.put(adapter)
        return adapter

    def save(
        self,
        folder: str | os.PathLike[str],
        name: str | None = None,
        *,
        layout: Literal["own", "mixlora", "moe-peft"] = "own",
    ) -> Path:
        """Write one adapter: a PEFT folder if it is static, else a mixture folder with one PEFT folder per expert.

        layout="mixlora" writes a MixLoRA under the published key names instead, "moe-peft" a LoRAMoE or MoLA.
        """
        write = _WRITERS[layout]
        adapter = self._named(name)
        controller = adapter.method.controller()
        if (
            controller
            and controller.needs_loop
            and adapter.trainable()
            and not adapter.is_controlled
        ):
            log.warning(
                "%s acts between optimizer steps, which nothing let %r do; train it with loramux.train.Trainer, or "
                "give the stock trainers loramux.train.hf.RouterCallback",
                *(adapter.method.title, adapter.name),
            )
        return write(self.model, adapter, Path(folder))

    def trainable_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Name -> parameter of one adapter, in declared order."""
        return self._named(name).trainable()

    def mask_experts(self, keep: Mapping[str, bool] | None, name: str | None = None) -> None:
        """Mask branches of a gated mixture at inference: {expert name: False} leaves it out; None lifts the mask.

        The gates of the others are renormalised, nothing is retrained.
        """
        adapter = self._named(name)
        if keep is None:
            adapter.mask = None
            return
        unknown = [expert for expert in keep if expert not in adapter.experts]
        if unknown:
            raise ValueError(
                f"no expert {unknown} in {adapter.name!r}; it has {list(adapter.experts)}"
            )
        mask = tuple(keep.get(expert, True) for expert in adapter.experts)
        if not any(mask):
            raise ValueError("all experts would be masked; call handle.use(None) for the bare base")
        adapter.mask = mask

    def describe(self) -> str:
        """What is attached, and which backend ran last and why."""
        lines = []
        for adapter in self.adapters.values():
            count = sum(p.numel() for p in adapter.parameters())
            trained = sum(p.numel() for p in adapter.trainable().values())
            lines.append(
                f"{adapter.name}: {adapter.method.title} at {len(adapter.rows)} linears, "
                f"{count:,} parameters, {trained:,} trainable, {adapter.method.servability}"
            )
        lines += [f"backend {name}: {why}" for name, why in self.dispatch.choices.items()]
        return "\n".join(lines) if lines else "no adapters"


def attach(
    model: nn.Module, config: MethodConfig, name: str = DEFAULT_NAME, *, backend: str = "auto"
) -> Handle:
    """Wrap the targeted linears of `model` with a new adapter, ready to train; the base is frozen.

    backend: "auto", or one of ops.choose.BACKENDS. Raises ValueError, with the model untouched, when
    the config does not fit the model. The random rows come from torch's global generator: seed it for
    repeatable starts.
    """
    check_name(name)
    check_bare(model)
    sites = find_sites(model)
    adapter = new_adapter(model, sites, config, name)
    return _attached(Handle(model, sites, backend), adapter)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = DEFAULT_NAME,
    *,
    trainable: bool = False,
    backend: str = "auto",
    check_base: bool = True,
) -> Handle:
    """Attach a saved adapter: a PEFT folder, a loramux mixture, or a published MixLoRA folder (safetensors only).

    All or nothing: a wrong base, missing, unused or non-finite tensors, unknown config keys or an adapter that changes
    nothing raise ValueError and leave the model as it was.
    """
    check_name(name)
    check_bare(model)
    sites = find_sites(model)
    adapter = persist.read_adapter(model, sites, Path(folder), name, trainable, check_base)
    return _attached(Handle(model, sites, backend), adapter)


def _attached(handle: Handle, adapter: Adapter) -> Handle:
    """The handle with its first adapter, or the model as it was."""
    try:
        handle.put(adapter)
    except BaseException:
        handle.detach()
        raise
    return handle


def new_adapter(model: nn.Module, sites: list[Site], config: MethodConfig, name: str) -> Adapter:
    """Fresh rows and routers for `config`, not yet attached."""
    method: Method = load_method(config.method)(config)
    if method.needs_adapters:
        return persist.gated_adapter(model, sites, method, name)
    if config.target_modules is None:
        refuse_fused_experts(model, sites)
    chosen = select_sites(sites, config)
    if config.target_modules is None:
        chosen = method.usual_sites(chosen)
    chosen = method.kept_sites(chosen)
    if not chosen:
        raise ValueError(
            f"{method.title} found none of the linears it usually targets; name some in target_modules"
        )
    config.check_patterns([site.path for site in chosen])
    method.check_sites(chosen)
    rows = {site.path: _fresh(model, site, method) for site in chosen}
    adapter = Adapter(name, method, {s.path: s for s in chosen}, rows, method.routers(chosen))
    adapter.set_trainable(True)
    return adapter


def _fresh(model: nn.Module, site: Site, method: Method) -> Rows:
    config = method.config
    magnitude = None
    if config.use_dora:
        weight: torch.Tensor = model.get_submodule(site.path).weight  # type: ignore[assignment]
        magnitude = weight_norm(weight.T if site.transposed else weight)
    experts = method.experts(site)
    rows = fresh_rows(
        site,
        experts,
        gaussian=config.init_lora_weights == "gaussian",
        magnitude_O=magnitude,
        gate=method.row_gate(site, sum(expert.rank for expert in experts)),
        tied=method.tied_experts(site),
    )
    method.start_rows(site, rows)
    return rows


def describe_config(config: MethodConfig) -> dict[str, Any]:
    """{"name": method, ...fields}: what `config_from_dict` reads back."""
    return {"name": config.method, **config.to_dict()}
