"""From what a caller wrote as `model` to the adapters that answer: parsed, looked up under the caller's rights, pinned.

    base | [tenant/]name[@version] | BASE:name | a*0.7+b*0.3 | router:NAME | auto

Why a cache: a lookup costs a query, an alias is asked for again and again. What is kept is dropped whenever the
registry's generation moves; within this process at once, for changes by others within POLL_S.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loramux.errors import LoramuxError
from loramux.server.errors import ApiError

log = logging.getLogger(__name__)
POLL_S = 0.2
MAX_NAME = 512  # characters; the longest reference that can be is shorter, and what is kept by name must stay small
AUTO, ROUTER = "auto", "router:"


@dataclass(frozen=True)
class Plan:
    """What answers a call: `mix` is ((digest, weight), ...), empty for the base; `versions` are in the same order.

    `label` is what the reply calls it, with versions. `router`: the mixture or router that decides, as "tenant/name@3".
    `retrieved`: what `auto` found; `routing`: that as JSON, for the reply and the receipt. `assembled`: a set of
    adapters that the server put under a router; `versions` is empty then, and `mix` has the set's name in the engine.
    """

    label: str
    mix: tuple[tuple[str, float], ...] = ()
    versions: tuple[Any, ...] = ()
    router: str | None = None
    retrieved: Any = None
    routing: dict[str, Any] | None = field(default=None, hash=False)
    router_digest: str | None = None
    assembled: Any = None

    @property
    def adapter(self) -> Any:
        """As the engine's Request wants it."""
        if not self.mix:
            return None
        if len(self.mix) == 1 and self.mix[0][1] == 1.0:
            return self.mix[0][0]
        return dict(self.mix)


@dataclass(frozen=True)
class Choice:
    """A `model` field, parsed: one of "base", "mix", "router", "auto"."""

    kind: str
    parts: tuple[tuple[str, float], ...] = field(default=())


def unknown_model(name: str) -> ApiError:
    """The same for a name that nobody has and for one that is somebody else's."""
    shown = f"'{name}'" if len(name) <= 200 and name.isprintable() else "that was given"
    return ApiError(
        f"The model {shown} does not exist or you do not have access to it.",
        code="model_not_found", param="model",
    )  # fmt: skip


def parse_model(text: str, base_name: str, max_mix: int = 8) -> Choice:
    """Take a `model` field apart. Names are not looked up here, and not checked beyond what tells them apart."""
    if text in (base_name, "base"):
        return Choice("base")
    if text == AUTO:
        return Choice("auto")
    if text in (ROUTER, f"{base_name}:"):
        raise unknown_model(text)
    is_mix = "*" in text or "+" in text
    if text.startswith(ROUTER) and not is_mix:
        return Choice("router", ((text.removeprefix(ROUTER), 1.0),))
    if text.startswith(f"{base_name}:"):
        text = text.removeprefix(f"{base_name}:")
    if not is_mix:
        return Choice("mix", ((text, 1.0),))
    parts = [_part(piece) for piece in text.split("+")]
    for name, _ in parts:
        if name in (base_name, "base", AUTO) or name.startswith(ROUTER):
            raise ApiError(
                f"a mix is of adapters, and {name[:80]!r} is none: the base is under every mix, 'auto' and routers "
                "stand alone",
                code="invalid_model", param="model",
            )  # fmt: skip
    if len(parts) > max_mix:
        raise ApiError(
            f"a mix names at most {max_mix} adapters, got {len(parts)}",
            code="invalid_model", param="model",
        )  # fmt: skip
    return Choice("mix", tuple(parts))


def _part(piece: str) -> tuple[str, float]:
    name, star, weight_text = piece.strip().partition("*")
    try:
        weight = float(weight_text) if star else 1.0
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight) or weight == 0:
        raise ApiError(
            "a mix looks like 'a*0.7+b*0.3', with weights that are finite and not 0",
            code="invalid_model", param="model",
        )  # fmt: skip
    return name.strip(), weight


class Names:
    """Resolved names, and what each tenant may use. Used by one event loop only."""

    def __init__(
        self,
        registry: Any,
        limit: int = 65536,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], Any] | None = None,
    ):
        self._registry, self._limit, self._clock = registry, limit, clock
        self._on_change = on_change  # called in a thread before anything new is looked up
        self._kept: OrderedDict[tuple[str, ...], Any] = OrderedDict()
        self._generation: Any = None
        self._looked_at = -math.inf
        self._look: asyncio.Future[None] | None = None
        self._is_behind = False  # what `on_change` does
        self._epoch = 0

    @property
    def epoch(self) -> int:
        """Rises when a change is noticed, and once more when what follows the registry has followed."""
        return self._epoch

    async def version(self, text: str, caller: Any) -> Any:
        """The registry's Version of a reference, or the error of a name that does not exist."""
        if len(text) > MAX_NAME:
            raise unknown_model(text)
        try:
            found = await self._cached(
                ("version", caller.tenant, text),
                lambda: self._registry.resolve(text, caller=caller.tenant),
            )
        except LoramuxError as error:
            if getattr(error, "code", None) in ("model_not_found", "bad_name"):
                raise unknown_model(text) from None
            raise
        return found

    async def current(self) -> int:
        """The epoch after a look at the registry, if one was due."""
        await self._follow()
        return self._epoch

    async def visible(self, caller: Any, base: str | None = None) -> tuple[Any, ...]:
        """All versions that the caller may use with this base."""
        found = await self._cached(
            ("visible", caller.tenant, base or ""),
            lambda: tuple(self._registry.visible(caller.tenant, base=base)),
        )
        assert isinstance(found, tuple)
        return found

    def forget(self) -> None:
        """The registry was changed in this process: the next lookup sees it."""
        self._kept.clear()
        self._epoch += 1
        self._looked_at = -math.inf

    async def _cached(self, key: tuple[str, ...], find: Callable[[], Any]) -> Any:
        await self._follow()
        if key in self._kept:
            self._kept.move_to_end(key)
            kept = self._kept[key]
            if isinstance(kept, LoramuxError):
                # A traceback grows each time its error is raised, and holds every frame it went through.
                raise kept.with_traceback(None)
            return kept
        epoch = self._epoch
        try:
            found = await asyncio.to_thread(find)
        except LoramuxError as error:
            # Kept as well: a missing name takes the same way, and the same time, as somebody else's.
            found = error
        if epoch == self._epoch:  # else it may be older than the change
            self._kept[key] = found
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        if isinstance(found, LoramuxError):
            raise found
        return found

    async def _follow(self) -> None:
        if self._clock() - self._looked_at < POLL_S:
            return
        if self._look is None:
            self._look = asyncio.ensure_future(self._poll())
        await asyncio.shield(self._look)

    async def _has_followed(self) -> bool:
        """Whether what follows the registry did; if not it is tried at the next look, and names are resolved anyway."""
        try:
            if self._on_change is not None:
                await asyncio.to_thread(self._on_change)
        except Exception:
            if not self._is_behind:  # once, and not five times a second
                log.exception("what follows the registry is behind; it is tried again")
            self._is_behind = True
            return False
        if self._is_behind:
            log.warning("what follows the registry is up to date again")
        self._is_behind = False
        return True

    async def _poll(self) -> None:
        try:
            epoch, now = self._epoch, self._clock()
            generation = await asyncio.to_thread(self._registry.generation)
            if generation != self._generation:
                # First: who looks at two things meanwhile may see one of each state.
                self._epoch += 1
                if await self._has_followed():
                    self._generation = generation
                self._kept.clear()
                self._epoch += 1
                epoch += 2
            if (
                epoch == self._epoch
            ):  # else something changed meanwhile: look again at the next call
                self._looked_at = now
        finally:
            self._look = None
