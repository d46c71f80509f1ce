"""Attaches adapters to an unmodified transformers model and takes them off again without a trace.

Four public seams are used: replaced linear children, forward hooks, the keyword arguments of a model call, and
`generate` of the instance (wrapped, to know that one generation is one prompt).
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loramux.core import checkpointing, prepass
from loramux.core.adapter import Adapter
from loramux.core.batch import supervised_share
from loramux.core.dispatch import Dispatch, call_by_name
from loramux.core.guards import check_bare, check_name
from loramux.core.head import hook_head
from loramux.core.linear import LoraLinear
from loramux.core.state import PromptStore
from loramux.core.types import RouteRecord, Site

log = logging.getLogger(__name__)
HOLDER = "loramux"  # the child of the model that owns all adapters


class Attachment(ABC):
    """Everything that was done to a model. One per model; `detach` undoes it exactly."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], backend: str = "auto"):
        check_bare(model)
        self.model = model
        self.is_attached = True
        self.sites = {site.path: site for site in sites}
        self.dispatch = Dispatch(backend)
        self.dispatch.weight = next(model.parameters())
        self.linears: dict[str, LoraLinear] = {}
        self._hooks: list[Any] = []
        self._arrivals: dict[
            str, Callable[..., None]
        ] = {}  # hooks of modules whose input a router reads
        self._listening: list[Any] = []
        self._instance: list[tuple[nn.Module, str]] = []
        self._frozen = [(p, p.requires_grad) for p in model.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        self.holder = nn.ModuleDict()
        model.add_module(HOLDER, self.holder)
        object.__setattr__(self.holder, "handle", self)
        self.dispatch.listen = self._listen
        self._hook_model()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Attached adapters by name, in the order they were added."""
        return self.dispatch.adapters

    def put(self, adapter: Adapter) -> None:
        """Wrap the sites of an adapter that is completely built, and register it. The first one becomes active."""
        self._check_attached()
        check_name(adapter.name)
        if adapter.name in self.adapters:
            raise ValueError(
                f"an adapter named {adapter.name!r} is attached; remove it or choose a name"
            )
        self._check_blocks(adapter)
        device = self.dispatch.weight.device
        if any(p.device != device for p in adapter.parameters()):
            adapter.to(device)
        adapter.train(self.model.training)
        routed = {path for path, _ in adapter.hooked_routers()}
        for site in self.sites.values():
            # In a block that is routed by rows every linear must know of them, with experts or without.
            if site.path in adapter.rows or site.block in routed:
                self._wrap(site)
        for path, _ in adapter.hooked_routers():
            self._hook_module(path)
        self.holder[_key(adapter.name)] = adapter
        self.adapters[adapter.name] = adapter
        self._forget()
        if len(self.adapters) == 1:
            self.dispatch.active = adapter.name

    def _check_attached(self) -> None:
        if not self.is_attached:
            raise ValueError("this handle was detached from its model; attach or load again")

    def _check_blocks(self, adapter: Adapter) -> None:
        """A block that is routed by rows needs a linear at which the rows fold back into tokens."""
        for path, router in adapter.hooked_routers():
            own = [site for site in self.sites.values() if site.block == path]
            if router.scope == "block" and not any(site.role == "exit" for site in own):
                raise ValueError(
                    f"{path} has no last linear that loramux knows by name (it has {[s.name for s in own]}), so a "
                    "token cannot be several rows there; use a method without experts inside the FFN"
                )

    def remove(self, name: str) -> None:
        """Take one adapter off. Linears stay wrapped until `detach`; unused, they are the bare base."""
        removed = self._named(name)
        self._refuse_in_use("remove")
        for path, rows in removed.rows.items():
            self.linears[path].states.pop(rows, None)
        del self.adapters[name]
        del self.holder[_key(name)]
        self._forget()
        if self.dispatch.active == name:
            self.dispatch.active = None
            log.warning("the active adapter %r was removed: the next calls run the bare base", name)

    def use(self, name: str | None) -> None:
        """Which adapter the next calls use for every row; None is the bare base."""
        self._check_attached()
        self._refuse_in_use("use")
        if name is not None:
            self._named(name)
        self.dispatch.active = name

    def _refuse_in_use(self, what: str) -> None:
        if self.dispatch.generation is not None or self.dispatch.rows is not None:
            raise ValueError(
                f"handle.{what}() while generate or a `with handle.batch(...)` is running would change the weights of "
                "requests under way; call it afterwards"
            )

    def _named(self, name: str | None) -> Adapter:
        self._check_attached()
        name = self.dispatch.active if name is None else name
        if name is None and len(self.adapters) == 1:
            name = next(iter(self.adapters))
        if name not in self.adapters:
            raise ValueError(
                f"no adapter named {name!r} is attached; there are {list(self.adapters)}"
            )
        return self.adapters[name]

    def _forget(self) -> None:
        self.dispatch.stores.clear()
        self.dispatch.last = None

    @contextmanager
    def batch(
        self,
        adapters: Sequence[str | None] | None = None,
        prompt_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
    ) -> Iterator[None]:
        """Model calls inside run these adapters, one per request (None: bare base), with these masks and task ids."""
        self._check_attached()
        for name in adapters or ():
            if name is not None:
                self._named(name)
        before = self.dispatch.rows, self.dispatch.masks
        tasks_before = self.dispatch.tasks
        self.dispatch.tasks = None if tasks is None else list(tasks)
        self.dispatch.rows = None if adapters is None else list(adapters)
        self.dispatch.masks = {"prompt_mask": prompt_mask, "segment_ids": segment_ids}
        try:
            yield
        finally:
            self.dispatch.rows, self.dispatch.masks = before
            self.dispatch.tasks = tasks_before

    @contextmanager
    def masking(self, masks: Mapping[str, Tensor], name: str | None = None) -> Iterator[None]:
        """Inside, rank row i of site p acts in request q with factor masks[p][q, i]; sites not named act in full.

        For scoring ranks: dozens of ablations are rows of one batch. Every call inside must hold as many requests.
        """
        with self.dispatch.masking(self._named(name), masks):
            yield

    # --- What the last forward did --------------------------------------------------------------

    def routing(self, name: str | None = None) -> list[RouteRecord]:
        """What the routers of the last forward decided, by layer; of one adapter or of all."""
        state = self.dispatch.state or self.dispatch.last
        if state is None:
            return []
        records = state.recorder.records.values()
        return [r for r in records if name is None or r.adapter == name]

    def aux_losses(self, name: str | None = None) -> dict[str, Tensor]:
        """Auxiliary losses of the last forward, coefficients applied: `adapter/loss` -> scalar."""
        state = self.dispatch.state or self.dispatch.last
        losses: dict[str, Tensor] = {}
        for member in state.members if state is not None else ():
            adapter = member.adapter
            if name is None or adapter.name == name:
                assert state is not None
                found = adapter.method.aux_losses(state.recorder.of(adapter.name))
                losses.update({f"{adapter.name}/{key}": value for key, value in found.items()})
        return losses

    # --- Hooks ------------------------------------------------------------------------------------

    def _hook_model(self) -> None:
        """The model, and its body for those who call it without the head."""
        body = getattr(self.model, getattr(self.model, "base_model_prefix", ""), None)
        for module in [self.model, *([body] if isinstance(body, nn.Module) else [])]:
            self._hooks += [
                module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True),
                module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
        self._hooks += hook_head(self.model)
        for name, wrap in (("generate", self._generate), ("save_pretrained", self._save)):
            original = getattr(self.model, name, None)
            if original is not None:
                setattr(
                    self.model, name, functools.wraps(original)(functools.partial(wrap, original))
                )
                self._instance.append((self.model, name))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dispatch = self.dispatch
        if dispatch.together is not None:  # opened by who called, see core/together.py
            if module is self.model:
                checkpointing.follow(self.model, dispatch)
            return None
        if module is self.model or module in dispatch.entered:
            dispatch.entered.clear()  # left open by an interrupt, which runs no hooks
        dispatch.entered.append(module)
        if len(dispatch.entered) > 1:
            return None
        call = call_by_name(module, args, kwargs)
        masks = [name for name in ("prompt_mask", "segment_ids", "tasks") if name in kwargs]
        dispatch.open(call, self.model.training)
        if self.model.training:
            checkpointing.follow(self.model, dispatch)
        prepass.run(self.model, dispatch, call)
        if masks:
            return args, {key: value for key, value in kwargs.items() if key not in masks}
        return None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        dispatch = self.dispatch
        if dispatch.together is not None:
            return None
        if dispatch.entered:
            dispatch.entered.pop()
        if dispatch.entered:
            return None
        state = dispatch.state
        cache = prepass.cache_of(output)
        dispatch.close(cache)
        if state is not None and state.twin is not None and cache is not None:
            prepass.join(cache, state.twin)
        if state is None or not state.training or output is None:
            return None
        state.tell_routers()
        call = call_by_name(module, args, kwargs)
        if call.get("labels") is None:
            return None
        auxiliary = self.aux_losses()
        if auxiliary:
            total = torch.stack(list(auxiliary.values())).sum()
            log_probs = getattr(output, "log_probs", None)
            if (
                log_probs is not None
            ):  # TRL's fused head: its trainer sums these and never reads `loss`
                output.log_probs = log_probs - output.label_mask * total.to(log_probs.dtype)
            extra = supervised_share(call) * total
            if isinstance(output, tuple):  # return_dict=False: the loss comes first
                return (output[0] + extra.to(output[0].dtype), *output[1:])
            output.loss = output.loss + extra.to(output.loss.dtype)
        return output

    def _hook_module(self, path: str) -> None:
        def arrived(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            if x is None:
                raise ValueError(f"{path} was called without hidden states; its router cannot run")
            self.dispatch.enter_module(path, x)

        self._listen(False)
        self._arrivals.setdefault(path, arrived)

    def _listen(self, wanted: bool) -> None:
        """Keep the routers' hooks on their modules only while there is something to decide.

        A hook that does nothing costs about as much as the LoRA of two linears, in every layer and decode step.
        """
        if wanted == bool(self._listening):
            return
        for hook in self._listening:
            hook.remove()
        self._listening = [
            self.model.get_submodule(path).register_forward_pre_hook(arrived, with_kwargs=True)
            for path, arrived in self._arrivals.items()
            if wanted
        ]

    # --- Wrapped methods of the instance ----------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk and any(a.routes_on_prompt for a in self.adapters.values()):
            raise ValueError(
                "an adapter here routes on the whole prompt, so its prefill cannot be chunked; "
                "leave prefill_chunk_size unset"
            )
        self._check_prompts(args, kwargs)
        before = self.dispatch.generation
        generation: dict[str, PromptStore] = {}
        self.dispatch.generation = generation
        try:
            return original(*args, **kwargs)
        finally:
            self.dispatch.generation = before

    def _check_prompts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Inside generate a call has more rows than prompts (beams): what was named must fit the prompts."""
        names = ("inputs", "input_ids", "inputs_embeds")
        given = next(
            (kwargs[n] for n in names if kwargs.get(n) is not None), args[0] if args else None
        )
        rows, mask = self.dispatch.rows, self.dispatch.masks.get("prompt_mask")
        if not torch.is_tensor(given):
            return
        if rows is not None and len(rows) != given.shape[0]:
            raise ValueError(
                f"generate was given {given.shape[0]} prompts, but {len(rows)} adapters were named; name one per "
                "prompt (None for the base)"
            )
        if mask is not None and tuple(mask.shape) != tuple(given.shape[:2]):
            raise ValueError(
                f"prompt_mask must have the shape of the prompts {tuple(given.shape[:2])}, got {tuple(mask.shape)}"
            )

    def _save(
        self,
        original: Callable[..., Any],
        save_directory: Any,
        is_main_process: bool = True,
        **_: Any,
    ) -> None:
        """`model.save_pretrained` of an attached model saves the active adapter, as PEFT models do."""
        if is_main_process:
            self.save(save_directory)

    @abstractmethod
    def save(self, folder: Any, name: str | None = None) -> Any:
        """Write one adapter; the file formats lie above this package."""

    def detach(self) -> None:
        """Give the model back as it was: the same linear objects, flags and methods; adapters are dropped."""
        if not self.is_attached:
            return
        self._refuse_in_use("detach")
        self.is_attached = False
        for hook in self._hooks:
            hook.remove()
        self._listen(False)
        for module, name in self._instance:
            delattr(module, name)
        checkpointing.release(self.model)
        for path, linear in self.linears.items():
            _replace(self.model, path, linear.base_layer)
        delattr(self.model, HOLDER)
        for parameter, flag in self._frozen:
            parameter.requires_grad_(flag)
        self.linears.clear()
        self.adapters.clear()
        self._forget()

    def _wrap(self, site: Site) -> None:
        if site.path in self.linears:
            return
        block, name = self.model.get_submodule(site.block), site.path.rpartition(".")[2]
        linear = LoraLinear(getattr(block, name), site, self.dispatch)
        linear.training = self.model.training
        setattr(block, name, linear)
        self.linears[site.path] = linear


def _key(name: str) -> str:
    """Key of an adapter in the module tree: no dots, and nothing a module already has."""
    return "adapter:" + name.replace(".", "/")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def handle_of(model: nn.Module) -> Any:
    """The handle of a model that `attach` or `load` was called on, or None."""
    holder = getattr(model, HOLDER, None)
    return getattr(holder, "handle", None)
