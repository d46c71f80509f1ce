"""Who is in this forward pass: members, routes by module, what was recorded.

Owned by the handle that `attach` returns, never a process global, so two models do not meet. The state of a forward
outlives it: activation checkpointing runs parts of it again during backward.

Letters: N tokens, Q requests, E experts of a site.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core.adapter import Adapter
from loramux.core.batch import Batch, read_batch
from loramux.core.plan import Member, layout_rows
from loramux.core.planner import Planner
from loramux.core.router import Router, RouteView
from loramux.core.state import Late, PromptStore, State
from loramux.core.together import Together
from loramux.core.types import EVERYTHING, Route, RouteRecord

log = logging.getLogger(__name__)


class Dispatch(Planner):
    """Builds a `State` per model call and answers the linears that ask what to do."""

    def __init__(self, requested_backend: str = "auto"):
        super().__init__(requested_backend)
        self.adapters: dict[str, Adapter] = {}
        self.last: State | None = None
        self.entered: list[nn.Module] = []  # the model and its body, while they run
        self.masks: dict[str, Tensor | None] = {}
        self.tasks: Sequence[str | None] | None = None  # task of each request, inside handle.batch
        self.generation: dict[str, PromptStore] | None = None
        self.stores: weakref.WeakKeyDictionary[Any, PromptStore] = weakref.WeakKeyDictionary()
        self.warned = False
        self.recomputing = False
        self.together: Together | None = None  # the joint forward pass that is open
        self.listen: Callable[[bool], None] = lambda _wanted: None  # hooks of routers on or off

    # --- Opening and closing a forward pass ----------------------------------------------------

    def open(self, call: dict[str, Any], training: bool) -> None:
        """Start a forward pass; `call` holds the model's arguments by name."""
        marked = call.get("prompt_mask")
        tasks = call.pop("tasks", None)
        batch = read_batch(call, self._mask("prompt_mask", call), self._mask("segment_ids", call))
        names = self._names(batch)
        present = [a for a in self.adapters.values() if a.name in names]
        by_prompt = [a.name for a in present if a.routes_on_prompt]
        if by_prompt and batch.past_length > 0 and marked is not None and bool(marked.any()):
            raise ValueError(
                f"adapters {by_prompt} route on the whole prompt, so it cannot come in chunks; "
                "give all prompt tokens in one call"
            )
        # A step of training is followed by no decoding.
        keeps = not (training and torch.is_grad_enabled())
        if not keeps:
            readers = [a.name for a in present if a.reads_prompt]
            self._warn_unknown_prompts(marked is not None, call, readers)
        store = self._store(call.get("past_key_values"), batch, names, by_prompt, keeps)
        # Decode steps of one shape share their plans: what is fixed for a request is lowered once.
        named = self.tasks if tasks is None else tasks
        known = None if named is None else tuple(named)
        key = (batch.lead, tuple(names), known, torch.is_grad_enabled(), training)
        decoding = batch.past_length > 0 and keeps
        if decoding and key in store.decoding:
            self.state = store.decoding[key]
            self.state.batch = batch
            self.state.forget_step()
            self.listen(not self.state.is_settled)
            return
        self.state = State(
            batch=batch,
            members=[self._member(adapter, names, batch) for adapter in present],
            training=training,
            keeps=keeps,
            needs_grad=torch.is_grad_enabled(),
            store=store,
            prompt_done=bool(store.routes) or batch.past_length > 0,
            routes=dict(store.routes),
            tasks=self._tasks(tasks, batch),
        )
        if decoding:
            store.decoding = {key: self.state}
        self.listen(not self.state.is_settled)

    def _warn_unknown_prompts(
        self, marked: bool, call: dict[str, Any], by_prompt: list[str]
    ) -> None:
        """Without labels a training step cannot say where the prompt ends (label smoothing takes them away)."""
        known = (
            marked or call.get("labels") is not None or self.masks.get("prompt_mask") is not None
        )
        if by_prompt and not known and not self.warned:
            self.warned = True
            log.warning(
                "training %s without labels and prompt_mask: its routers read the answers too, and outputs.loss lacks "
                "their auxiliary loss (handle.aux_losses() has it); pass both, or leave label smoothing off",
                by_prompt,
            )

    def close(self, cache: Any = None) -> None:
        """End it; `cache` is the KV cache the model returned, which the prompt's routes now belong to."""
        state = self.state
        self.last, self.state = state, None
        if state is not None and cache is not None and state.keeps:
            self.stores[cache] = state.store

    def _mask(self, name: str, call: dict[str, Any]) -> Tensor | None:
        given: Tensor | None = call.pop(name, None)
        if given is not None:
            return given
        mask = self.masks.get(name)
        if mask is None or name != "prompt_mask" or self.generation is None:
            return mask
        # Inside generate a prompt is several rows (beams), and without a cache its answer follows it.
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        times, longer = tokens.shape[0] // mask.shape[0], tokens.shape[1] - mask.shape[1]
        return nn.functional.pad(mask.repeat_interleave(times, dim=0), (0, max(longer, 0)))

    def _names(self, batch: Batch) -> list[str | None]:
        """The adapter of every request."""
        if self.rows is None:
            return [self.active] * batch.num_requests
        gone = [name for name in self.rows if name is not None and name not in self.adapters]
        if gone:
            raise ValueError(f"adapters {gone} were removed while this batch names them")
        num, listed = batch.num_requests, len(self.rows)
        if num == listed:
            return list(self.rows)
        # Beams and several answers per prompt: generate repeats each request in place.
        if self.generation is not None and listed and num % listed == 0:
            return [name for name in self.rows for _ in range(num // listed)]
        raise ValueError(
            f"the batch holds {num} requests, but {listed} adapters were named; name one per request "
            "(None for the base)"
        )

    def _tasks(
        self, given: Sequence[str | None] | None, batch: Batch
    ) -> tuple[str | None, ...] | None:
        """The task of every request; beams and several answers per prompt repeat it in place."""
        named = self.tasks if given is None else given
        if named is None:
            return None
        num, listed = batch.num_requests, len(named)
        if num != listed and not (self.generation is not None and listed and num % listed == 0):
            raise ValueError(
                f"the batch holds {num} requests, but {listed} tasks were named; name one per request "
                "(None where it is not known)"
            )
        return tuple(task for task in named for _ in range(num // listed))

    def _member(self, adapter: Adapter, names: list[str | None], batch: Batch) -> Member:
        if all(name == adapter.name for name in names):
            return Member(adapter, None, batch.request_N, batch.num_tokens)
        mine_Q = torch.tensor([name == adapter.name for name in names], device=batch.device)
        token_n = mine_Q[batch.request_N].nonzero()[:, 0]
        return Member(adapter, token_n, batch.request_N[token_n], int(token_n.shape[0]))

    def _store(
        self,
        cache: Any,
        batch: Batch,
        names: list[str | None],
        by_prompt: list[str],
        keeps: bool,
    ) -> PromptStore:
        store: PromptStore | None = None
        if batch.past_length > 0:
            store = self.stores.get(cache)
        if store is None and self.generation is not None:
            store = self.generation.get("store")
        if store is None:
            if batch.past_length > 0 and by_prompt:
                raise ValueError(
                    "this KV cache was not filled through this adapter, so the routes of its prompt are unknown; "
                    "run the whole prompt again, or generate without past_key_values"
                )
            store = PromptStore(batch.num_requests, names)
        if by_prompt and store.routes and store.num_requests != batch.num_requests:
            raise ValueError(
                f"the prompt's routes are for {store.num_requests} requests, this call holds {batch.num_requests}; "
                "continue the same batch"
            )
        if batch.past_length > 0 or store.routes:
            for was, now in zip(store.names, names, strict=False):
                if now in by_prompt and was != now:
                    raise ValueError(
                        f"this KV cache was filled under adapter {was!r}, so {now!r} has no routes for its prompt; "
                        f"run the whole prompt again under {now!r}"
                    )
        if self.generation is not None:
            self.generation["store"] = store
        if cache is not None and keeps:
            self.stores[cache] = store
        return store

    @contextmanager
    def resume(self, state: State) -> Iterator[None]:
        """Run a piece of an earlier forward pass again (activation checkpointing does, inside backward)."""
        before, self.state = (self.state, self.recomputing), state
        self.recomputing = True
        state.plans.clear()
        state.pairs.clear()
        state.forget_step()
        self.listen(not state.is_settled)
        try:
            yield
        finally:
            self.state, self.recomputing = before

    # --- Routing --------------------------------------------------------------------------------

    def enter_module(self, path: str, x: Tensor) -> None:
        """The input of a module with routers arrived."""
        if self.together is not None:
            self.together.enter_module(path, x)
            return
        state = self.state
        if state is None:
            return
        rows: list[tuple[Member, Route]] = []
        for member in state.members:
            router = member.adapter.routers.get(path)
            if router is None or router.reads != "x":
                continue
            if router.when == "prompt" and state.prompt_done:
                continue
            own_nD = self._own_input(state, member, path, x.reshape(-1, x.shape[-1]))
            route = self.run_router(state, member, path, router, own_nD)
            if route.combine == "rows":
                rows.append((member, route))
        if rows:
            state.layouts[path] = layout_rows(state.batch.num_tokens, rows, state.batch.device)

    def _own_input(self, state: State, member: Member, path: str, x: Tensor) -> Tensor:
        """The member's tokens of a module's input; in front of an `exit` linear the input may be FFN rows."""
        site = member.adapter.sites.get(path)
        layout = None if site is None or site.role != "exit" else state.layouts.get(site.block)
        if layout is None or layout.first_N is None:
            return member.own(x)
        return x[member.own(layout.first_N)]

    def run_router(
        self, state: State, member: Member, path: str, router: Router, own_nD: Tensor
    ) -> Route:
        """Run one router on the tokens of its adapter, keep and return its route."""
        name = member.adapter.name
        prompt_n = member.own(state.batch.prompt_N)
        if router.when == "prompt" and router.needs_prompt:
            self._check_prompts(member, prompt_n, state.batch)
        layer = member.adapter.layer_of(path)

        def record(**fields: Any) -> None:
            state.recorder.put(RouteRecord(name, path, layer, router.when, **fields))

        mask = member.adapter.mask
        view = RouteView(
            x_ND=own_nD,
            request_N=member.request_n,
            prompt_N=prompt_n,
            valid_N=member.own(state.batch.valid_N),
            num_requests=state.batch.num_requests,
            training=state.training,
            record=record,
            mask_E=None if mask is None else torch.tensor(mask, device=own_nD.device),
            tasks=state.tasks,
            recomputed=self.recomputing,
        )
        route = router(view, state.routes.get((name, path), EVERYTHING))
        state.routes[name, path] = route
        if router.when == "prompt" and state.keeps:
            state.store.routes[name, path] = route
            state.store.num_requests = state.batch.num_requests
        return route  # type: ignore[no-any-return]

    def _check_prompts(self, member: Member, prompt_n: Tensor, batch: Batch) -> None:
        seen_Q = torch.zeros(batch.num_requests, dtype=torch.bool, device=batch.device)
        owned_Q = seen_Q.clone()
        owned_Q[member.request_n[member.own(batch.valid_N)]] = True
        seen_Q[member.request_n[prompt_n]] = True
        missing = (owned_Q & ~seen_Q).nonzero()[:, 0].tolist()
        if missing:
            raise ValueError(
                f"adapter {member.adapter.name!r} routes on the prompt, but requests {missing} of this batch have no "
                "prompt token; mask at least one leading token out of the labels, or pass prompt_mask"
            )


def call_by_name(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a model call by name; positional ones are input_ids, attention_mask, ... as in transformers."""
    if not args:
        return kwargs
    import inspect

    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


__all__ = ["Dispatch", "Late", "PromptStore", "State", "call_by_name"]
