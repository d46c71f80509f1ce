"""Who is in this forward pass: members, routes by module, plans by site, what was recorded.

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
from loramux.core.plan import Apply, Member, Part, Plan, RowLayout, layout_rows, lower
from loramux.core.router import Router, RouteView
from loramux.core.state import Late, PromptStore, State
from loramux.core.types import EVERYTHING, Route, RouteRecord, Site
from loramux.ops.choose import choose_backend, load_backend
from loramux.ops.contract import Pairs

log = logging.getLogger(__name__)
KERNEL_DTYPES = (torch.float32, torch.bfloat16)  # of adapter rows, in the C kernel


class Dispatch:
    """Builds a `State` per model call and answers the linears that ask what to do."""

    def __init__(self, requested_backend: str = "auto"):
        self.requested_backend = requested_backend
        self.weight = torch.empty(0)  # a parameter of the model: its dtype follows model.to(...)
        self.unfused: set[str] = set()  # sites whose base the C kernel cannot compute
        self.adapters: dict[str, Adapter] = {}
        self.state: State | None = None
        self.last: State | None = None
        self.entered: list[nn.Module] = []  # the model and its body, while they run
        self.active: str | None = None
        self.rows: Sequence[str | None] | None = (
            None  # adapter of each request, inside handle.batch
        )
        self.masks: dict[str, Tensor | None] = {}
        self.generation: dict[str, PromptStore] | None = None
        self.stores: weakref.WeakKeyDictionary[Any, PromptStore] = weakref.WeakKeyDictionary()
        self.choices: dict[str, str] = {}
        self.warned = False
        self.listen: Callable[[bool], None] = lambda _wanted: None  # hooks of routers on or off

    # --- Opening and closing a forward pass ----------------------------------------------------

    def open(self, call: dict[str, Any], training: bool) -> None:
        """Start a forward pass; `call` holds the model's arguments by name."""
        marked = call.get("prompt_mask")
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
            self._warn_unknown_prompts(marked is not None, call, by_prompt)
        store = self._store(call.get("past_key_values"), batch, names, by_prompt, keeps)
        # Decode steps of one shape share their plans: what is fixed for a request is lowered once.
        key = (batch.lead, tuple(names), torch.is_grad_enabled(), training)
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
        before = self.state
        self.state = state
        state.plans.clear()
        state.pairs.clear()
        state.forget_step()
        self.listen(not state.is_settled)
        try:
            yield
        finally:
            self.state = before

    # --- Routing --------------------------------------------------------------------------------

    def enter_module(self, path: str, x: Tensor) -> None:
        """The input of a module with routers arrived."""
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
            own_nD = member.own(x.reshape(-1, x.shape[-1]))
            route = self.run_router(state, member, path, router, own_nD)
            if route.combine == "rows":
                rows.append((member, route))
        if rows:
            state.layouts[path] = layout_rows(state.batch.num_tokens, rows, state.batch.device)

    def run_router(
        self, state: State, member: Member, path: str, router: Router, own_nD: Tensor
    ) -> Route:
        """Run one router on the tokens of its adapter, keep and return its route."""
        name = member.adapter.name
        prompt_n = member.own(state.batch.prompt_N)
        if router.when == "prompt":
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

    # --- Plans ------------------------------------------------------------------------------------

    def plan(self, site: Site) -> Plan | None:
        """What the linear at `site` does now; None: nothing but its base."""
        state = self.state
        if state is None:
            if self.active is None and self.rows is None:
                return None
            raise RuntimeError(
                f"{site.path} was called outside a forward pass of the model it belongs to; call the model itself, "
                "or choose no adapter with handle.use(None)"
            )
        if site.path in state.plans:
            return state.plans[site.path]
        if site.path in state.step_plans:
            return state.step_plans[site.path]
        fixed = not any(m.adapter.routes_tokens_at(site) for m in state.members)
        plan = self._build(state, site, state.pairs if fixed else state.step_pairs)
        (state.plans if fixed else state.step_plans)[site.path] = plan
        return plan

    def _build(
        self, state: State, site: Site, known: dict[tuple[object, ...], Pairs | None]
    ) -> Plan | None:
        members = [m for m in state.members if site.path in m.adapter.rows]
        layout = state.layouts.get(site.block) if site.role != "plain" else None
        if not members and layout is None:
            return None
        parts = []
        for member in members:
            part = self._part(state, site, member, layout, known)
            if part is not None:
                parts.append(part)
        backend, apply = self._backend(state, site, parts, layout)
        for part in parts:
            part.apply = apply
        if layout is None:
            return Plan(backend, parts)
        if site.role == "enter":
            return Plan(backend, parts, layout.map, lead_out=(1, layout.map.num_rows))
        return Plan(backend, parts, layout.map, layout.bias_N, state.batch.lead)

    def _part(
        self,
        state: State,
        site: Site,
        member: Member,
        layout: RowLayout | None,
        known: dict[tuple[object, ...], Pairs | None],
    ) -> Part | None:
        adapter = member.adapter
        rows = adapter.rows[site.path]
        if rows.spans.num_rows == 0:
            return None
        route = state.route(adapter, site)
        keep = state.needs_grad
        where = site.block if route.gate is None else site.path
        key = (adapter.name, where, site.role, rows.spans.num_slots, layout is not None)
        if key not in known:
            known[key] = lower(site, member, route, layout, state.batch.num_tokens, keep)
        pairs = known[key]
        if pairs is None:
            return None
        dropout = adapter.method.config.lora_dropout if state.training else 0.0
        late = None
        unit = adapter.method.unit_of(site)
        if unit is not None:
            late = Late(self.run_router, state, member, unit, first=unit == site.path)
        return Part(rows, pairs, apply=_unset, dropout=dropout, late=late)

    def _backend(
        self, state: State, site: Site, parts: list[Part], layout: RowLayout | None
    ) -> tuple[str, Apply]:
        simple = all(
            p.rows.magnitude is None
            and p.late is None
            and p.dropout == 0
            and p.rows.a.dtype in KERNEL_DTYPES
            for p in parts
        )
        num_rows = state.batch.num_tokens if layout is None else layout.map.num_rows
        total_rank = sum(p.rows.spans.num_rows for p in parts)
        # Token routes are lowered in every step, and the choice costs as much as a small linear.
        key = (num_rows, total_rank, self.weight.dtype, self.requested_backend)
        choice = state.choices.get(key)
        if choice is None:
            choice = state.choices[key] = choose_backend(
                device=state.batch.device,
                dtype=self.weight.dtype,
                num_rows=num_rows,
                needs_grad=state.needs_grad,
                total_rank=total_rank,
                requested=self.requested_backend,
            )
        name, reason = choice.name, choice.reason
        if name == "cpu" and (site.path in self.unfused or not simple):
            name, reason = (
                "reference",
                "DoRA, gates that read t, Conv1D, quantised linears and fp16 or fp64 rows run in torch",
            )
        self.choices[name] = reason
        return name, load_backend(name)


def _unset(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a part was used before its backend was chosen")


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
