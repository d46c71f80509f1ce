"""Asks a model, by a few short forwards, what the engine must know of it, and refuses what the engine cannot serve.

Why: what a family's attention is like is written in its code, not in its config. So the model runs with attention and
mask functions of ours, which see what each layer hands to them: shapes, scale, and the rule by which it masks. It runs
in two pieces, with nothing kept in between but keys and values; if that is not the plain forward, it keeps a state
that the engine does not.

Letters: N tokens, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from loramux.core.modes import evaluating
from loramux.core.sites import find_sites
from loramux.engine.kv import KVShape
from loramux.engine.masks import record_mask, window_of
from loramux.ops.paged import attend_dense

NAME = "loramux_probe"
PIECES = (5, 3)  # tokens of the two forwards
MAX_DIFFERENCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the norm; 0.1 for shorter dtypes
# Keywords of attention functions that mean nothing here: who is who is the engine's to know.
HARMLESS = {"dropout", "position_ids", "output_attentions", "use_cache", "is_causal"}
UNDERSTOOD = {"scaling", "softcap", "sliding_window"}


class UnservableModelError(ValueError):
    """The engine cannot run this model as transformers would."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; run this model with transformers' generate")


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer. `window`: how many tokens a token sees, itself included; None for all before it."""

    path: str
    module: nn.Module
    num_heads: int
    kv: KVShape
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True, eq=False)
class ModelShape:
    """layers: in the order in which they run. groups: paths of the sites of one module that read the very same tensor
    (q/k/v, gate/up), in the order in which they run; a site that shares its input with none is a group of one.
    """

    layers: tuple[AttentionSite, ...]
    groups: tuple[tuple[str, ...], ...]

    @property
    def kv(self) -> list[KVShape]:
        return [layer.kv for layer in self.layers]


def probe_model(model: nn.Module) -> ModelShape:
    """Runs the model on a few tokens. Raises UnservableModelError, saying what stands in the way."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise UnservableModelError(
            f"{type(model).__name__} is not a decoder-only transformers model"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, record_mask)
    probe = Probe({module: path for path, module in model.named_modules()})
    tokens = torch.arange(sum(PIECES), device=next(model.parameters()).device)[None]
    tokens = tokens % config.get_text_config().vocab_size
    with evaluating(model), torch.inference_mode():
        with attention_set_to(model, NAME), probe.installed(), _inputs_of(model) as inputs:
            logits = _in_pieces(model, tokens, probe, inputs)
        expected = config.get_text_config().num_hidden_layers
        if len(probe.found) != expected:
            raise UnservableModelError(
                f"{len(probe.found)} of {expected} layers of {type(model).__name__} attend through transformers' "
                "attention interface, and the engine cannot keep the state of the others (state-space or linear "
                "attention, or an attention of the family's own)"
            )
        plain = model(input_ids=tokens, use_cache=False).logits[:, -PIECES[-1] :]
    difference = float((logits - plain).double().norm() / plain.double().norm())
    if not difference <= MAX_DIFFERENCE.get(plain.dtype, 0.1):
        raise UnservableModelError(
            f"{type(model).__name__} run in two pieces over kept keys and values is {difference:.1e} off the plain "
            "forward: it keeps a state of another kind, or attends in a way of its own"
        )
    return ModelShape(tuple(probe.found.values()), _groups(inputs))


def _in_pieces(model: nn.Module, tokens: Tensor, probe: Probe, inputs: list[Any]) -> Tensor:
    """Logits of the last piece; `inputs` are left as the first one made them."""
    positions, first, logits = torch.arange(sum(PIECES), device=tokens.device)[None], 0, tokens
    seen: list[Any] = []
    for count in PIECES:
        piece = slice(first, first + count)
        probe.begin(count)
        inputs.clear()
        try:
            logits = model(
                input_ids=tokens[:, piece], position_ids=positions[:, piece], use_cache=False
            ).logits
        except TypeError as error:
            raise UnservableModelError(
                f"{type(model).__name__} does not take what the engine hands to it ({error})"
            ) from error
        seen = seen or list(inputs)
        first += count
    inputs[:] = seen
    return logits


# --- What attention is handed ---------------------------------------------------------------------


@dataclass
class Probe:
    """Collects what the layers hand to attention. `paths` names the modules."""

    paths: dict[nn.Module, str]
    found: dict[nn.Module, AttentionSite] = field(default_factory=dict)
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    num_tokens: int = 0
    done: set[nn.Module] = field(default_factory=set)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block every module knows the probe: some families hand no keywords on to their attention."""
        try:
            for module in self.paths:
                vars(module)[NAME] = self
            yield
        finally:
            for module in self.paths:
                vars(module).pop(NAME, None)

    def begin(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.done.clear()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: Any
    ) -> Tensor:
        path = self.paths[module]
        if module in self.done:
            raise UnservableModelError(
                f"{path} runs twice in one forward, and the engine keeps one set of keys and values per layer"
            )
        self.done.add(module)
        if query.shape[2] != self.num_tokens or key.shape[2] != self.num_tokens:
            raise UnservableModelError(
                f"{path} attends from {query.shape[2]} tokens to {key.shape[2]} in a forward of {self.num_tokens}; the "
                "engine knows plain self-attention only"
            )
        if module not in self.found:
            self.found[module] = _describe(path, module, query, key, value, mask, given)
        site = self.found[module]
        past = self.kept.get(module)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        self.kept[module] = key, value
        key_C = torch.arange(key.shape[2], device=key.device)
        query_N = key_C[-query.shape[2] :, None]
        mask_NC = key_C <= query_N
        if site.window is not None:
            mask_NC &= query_N - key_C < site.window
        return attend_dense(query[0], key[0], value[0], site.scale, mask_NC, site.softcap)[None]


def _describe(
    path: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, given: Any
) -> AttentionSite:
    foreign = {name for name, what in given.items() if what is not None} - HARMLESS - UNDERSTOOD
    if foreign:
        raise UnservableModelError(
            f"attention of {path} uses {sorted(foreign)}, which the engine's attention does not know"
        )
    try:
        window = window_of(mask, given.get("sliding_window"))
    except ValueError as error:
        raise UnservableModelError(f"attention of {path} {error}") from error
    scale = given.get("scaling")
    return AttentionSite(
        path,
        module,
        query.shape[1],
        KVShape(key.shape[1], key.shape[3], value.shape[3]),
        query.shape[3] ** -0.5 if scale is None else float(scale),
        window,
        given.get("softcap"),
    )


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    probe: Probe = vars(module)[NAME]
    return probe.attend(module, query, key, value, attention_mask, given), None


# --- The model around it --------------------------------------------------------------------------


@contextmanager
def attention_set_to(model: nn.Module, name: str) -> Iterator[None]:
    """Attention of this name within the block, what it was before afterwards."""
    configs = configs_of(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def configs_of(model: nn.Module) -> list[Any]:
    """Every config object that an attention module of this model may ask for its implementation."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


@contextmanager
def _inputs_of(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """(path, input) of every site, in the order in which they run."""
    seen: list[tuple[str, Tensor]] = []

    def listen(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        # The tensor is kept: its identity is what counts, and an address may be used again.
        return lambda _, args: seen.append((path, args[0]))

    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(listen(site.path))
        for site in find_sites(model)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _groups(inputs: Sequence[tuple[str, Tensor]]) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[str, int], list[str]] = {}
    for path, x in inputs:
        members = groups.setdefault((path.rpartition(".")[0], id(x)), [])
        if path not in members:
            members.append(path)
    return tuple(map(tuple, groups.values()))
