"""An adapter in memory: its method, its rows at every site and its routers, under one name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from loramux.core.bank import Rows
from loramux.core.method import Method
from loramux.core.router import Router
from loramux.core.types import Site


class Adapter(nn.Module):
    """Owns every parameter a method trains. Registered in the model's tree, so optimizers and `.to()` find it.

    rows and routers are keyed by module path, in declared site order. `experts` names the experts that came from
    elsewhere (frozen adapters), in slot order.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        sites: Mapping[str, Site],
        rows: Mapping[str, Rows],
        routers: Mapping[str, Router],
        experts: tuple[str, ...] = (),
    ):
        super().__init__()
        self.name = name
        self.method = method
        self.sites = dict(sites)
        self.experts = experts
        self.mask: tuple[bool, ...] | None = None
        self.is_controlled = False  # a training loop drives its method's controller
        self.saved_configs: dict[
            str, Mapping[str, Any]
        ] = {}  # adapter_config.json of experts read from disk
        # A module name may not contain a dot; a module path is made of them.
        self.rows_by_key = nn.ModuleDict({key_of(path): entry for path, entry in rows.items()})
        self.routers_by_key = nn.ModuleDict({key_of(p): entry for p, entry in routers.items()})
        self.rows: dict[str, Rows] = dict(rows)
        self.routers: dict[str, Router] = dict(routers)
        # These read the last hidden state of the bare base, which runs first: see core/prepass.py.
        self.hidden_routers = tuple((p, r) for p, r in self.routers.items() if r.reads == "hidden")
        self._token_paths: set[str | None] = {
            p for p, r in self.hooked_routers() if r.when == "token"
        }
        self._site_paths = {p for p, _ in self.hooked_routers() if p in self.sites}
        beneath = {path: site.layer for site in self.sites.values() for path in _above(site)}
        self._layers = beneath

    def set_trainable(self, trainable: bool) -> None:
        """Rows only where the method trains rows; routers always; everything off when False."""
        self.rows_by_key.requires_grad_(trainable and self.method.trains_rows)
        self.routers_by_key.requires_grad_(trainable)
        if trainable:  # half-precision files are widened for training, which loses nothing
            for parameter in self.trainable().values():
                if parameter.dtype.itemsize < 4:
                    parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, in declared order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def hooked_routers(self) -> Iterator[tuple[str, Router]]:
        """Routers that read a module's input before it runs (late ones read t inside the linear)."""
        return ((path, r) for path, r in self.routers.items() if r.reads == "x")

    @property
    def routes_on_prompt(self) -> bool:
        return any(router.when == "prompt" for router in self.routers.values())

    @property
    def reads_prompt(self) -> bool:
        """Whether such a router looks at the prompt's tokens, and not only at tasks."""
        return any(r.when == "prompt" and r.needs_prompt for r in self.routers.values())

    def routes_tokens_at(self, site: Site) -> bool:
        """Whether this site's pairs change with every token."""
        if self.hidden_routers:
            return True
        return not self._token_paths.isdisjoint((self.method.governor_of(site), *_above(site)))

    def routes_site(self, site: Site) -> bool:
        """Whether the site has a route of its own."""
        return site.path in self._site_paths or self.method.governor_of(site) == site.path

    def layer_of(self, path: str) -> int:
        """Layer index of a module that holds sites, or of a site."""
        return self._layers[path]


def _above(site: Site) -> tuple[str, str, str]:
    return site.path, site.block, site.layer_path


def key_of(path: str) -> str:
    return path.replace(".", "/")
