"""What decodes in the engine's measurements: engines with different adapters, the bare model, and other people's code.

"Own base" is the engine with no adapter on any request; "bare" the unmodified model's own decode step and the choice of
the most likely token. All subjects read one set of base weights: what differs is only what they make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramux.bench import peers
from loramux.bench.adapters import Tenants, by_name
from loramux.bench.checks import Reference
from loramux.bench.decode import Decoder, make_prompt
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, interleave
from loramux.bench.shape import Effort, twin_of
from loramux.bench.streams import Asked, Batch, Decoding, build_engine
from loramux.bench.subjects import package

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BARE, BARE_COPY = "bare", "bare copy"
BASE, BASE_COPY = "base", "base copy"
TENANTS, TENANTS_COPY, SHARED = "tenants", "tenants copy", "shared"
MILORA, MIXLORA, GATED, MIXED = "milora", "mixlora", "gated", "mixed"
PEFT, XLORA, ARROW, PACKAGE = "peft", "xlora", "arrow", "package"
ENGINES = (BASE, BASE_COPY, TENANTS, TENANTS_COPY, SHARED, MILORA, MIXLORA, GATED, MIXED)
TITLES = {
    BARE: "bare transformers model",
    BARE_COPY: "a second bare transformers model",
    BASE: "engine, no adapter",
    BASE_COPY: "a second engine, no adapter",
    TENANTS: "engine, an r=8 LoRA per request",
    TENANTS_COPY: "a second engine, an r=8 LoRA per request",
    SHARED: "engine, one r=8 LoRA for all requests",
    MILORA: "engine, a MiLoRA r=8 top-3 of 7 per request",
    MIXLORA: "engine, a MixLoRA r=8, 8 experts top-2, per request",
    GATED: "engine, a gated mixture of 4 LoRAs per request",
    MIXED: "engine, a quarter each: LoRA, MiLoRA, MixLoRA, gated mixture of 4",
    PEFT: "PEFT mixed batch (adapter_names), the same LoRAs",
    XLORA: "PEFT X-LoRA over 4 LoRAs, no KV cache",
    ARROW: "PEFT Arrow over 4 LoRAs, top-2",
    PACKAGE: "mixlora package, 8 experts top-2",
}


@dataclass(frozen=True)
class Setting:
    """What the subjects of one batch size share."""

    model: PreTrainedModel
    tenants: Tenants
    batch: int
    context: int
    steps: int

    @property
    def vocab(self) -> int:
        return int(self.model.config.vocab_size)

    def of(self, asked: Sequence[Asked]) -> Batch:
        return Batch(tuple(asked), self.context, self.vocab, seed=self.batch)


def asked_by(name: str, tenants: Tenants, batch: int) -> tuple[Asked, ...]:
    """What the requests of an engine's batch name: an adapter each, as long as there are enough of its kind."""
    kinds = {
        TENANTS: tenants.plain,
        SHARED: tenants.plain[:1],
        MILORA: tenants.milora,
        MIXLORA: tenants.mixlora,
        GATED: tenants.gated,
    }
    if name in (BASE, BASE_COPY):
        return (None,) * batch
    if name == MIXED:
        quarter = batch // 4
        return sum((asked_by(k, tenants, quarter) for k in (TENANTS, MILORA, MIXLORA, GATED)), ())
    folders = kinds[name.removesuffix(" copy")]
    return tuple(folders[i % len(folders)].name for i in range(batch))


def all_folders(tenants: Tenants) -> dict[str, Path]:
    return by_name([*tenants.plain, *tenants.milora, *tenants.mixlora, *tenants.gated])


def engine_for(setting: Setting, asked: Sequence[Asked], **options: Any) -> Any:
    """An engine with just the adapters that are asked for."""
    folders = all_folders(setting.tenants)
    named = {name: folders[name] for name in dict.fromkeys(asked) if isinstance(name, str)}
    # Between two restarts the context grows by less than twice what is wanted, or by a few tokens.
    room = 2 * setting.context + 64
    return build_engine(setting.model, named, batch=setting.batch, context=room, **options)


def makers(setting: Setting) -> dict[str, Callable[[], Any]]:
    """How each subject is built."""
    model, tenants, batch = setting.model, setting.tenants, setting.batch
    prompt_BT = make_prompt(batch, setting.context, setting.vocab)
    four = tenants.plain[:4]

    def decoding(name: str) -> Decoding:
        asked = asked_by(name, tenants, batch)
        return Decoding(engine_for(setting, asked), setting.of(asked), setting.steps)

    def decoder(made: Any) -> Decoder:
        return Decoder(made, prompt_BT, setting.steps, picks=True)

    def mixed() -> Decoder:
        names = [folder.name for folder in tenants.plain[:batch]]
        return decoder(peers.peft_mixed(model, by_name(tenants.plain), names))

    return {
        **{name: lambda n=name: decoding(n) for name in ENGINES},  # type: ignore[misc]
        BARE: lambda: decoder(twin_of(model)),
        BARE_COPY: lambda: decoder(twin_of(model)),
        PEFT: mixed,
        XLORA: lambda: peers.Recomputed(peers.peft_xlora(model, four), prompt_BT, setting.steps),
        ARROW: lambda: decoder(peers.peft_arrow(model, four)),
        PACKAGE: lambda: decoder(package(twin_of(model), tenants.mixlora[0])),
    }


def timed(
    title: str, setting: Setting, names: Sequence[str], effort: Effort, begin: Begin
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of the subjects of these names, checked before, and what is absent with the reason."""
    build = makers(setting)
    subjects, absent = peers.line_up({name: build[name] for name in names})
    try:
        check_engines(setting, subjects)
        check_peers(subjects)
        measures: dict[str, Measure] = dict(subjects)
        advance = begin(title, (effort.engine_rounds + 1) * len(subjects))
        seconds = interleave(measures, effort.engine_rounds, seed=setting.batch, done=advance)
    finally:
        close_engines(subjects)
    return seconds, {TITLES[name]: why for name, why in absent.items()}


def check_engines(setting: Setting, subjects: Mapping[str, Any]) -> None:
    """Refuse to time an engine that does not compute what its title says."""
    reference = Reference(setting.model, all_folders(setting.tenants), setting.vocab)
    for name, subject in subjects.items():
        if name in ENGINES:
            asked = asked_by(name, setting.tenants, setting.batch)
            reference.check(subject.engine, TITLES[name], asked)


def check_peers(subjects: Mapping[str, Any]) -> None:
    """Refuse to time an implementation that answers some request as if it had no adapter."""
    logits = {}
    for name in (BARE, PEFT, ARROW, PACKAGE):
        if name in subjects:
            with torch.no_grad():
                logits[name] = subjects[name].step(0)[:, -1]
            subjects[name].rewind(1)
    for name in logits.keys() - {BARE}:
        same = (logits[name] == logits[BARE]).all(-1)
        if same.any():
            raise RuntimeError(
                f"{TITLES[name]} gives the bare model's outputs for {int(same.sum())} of {len(same)} requests; "
                "not timing that"
            )


def close_engines(subjects: Mapping[str, Any]) -> None:
    for name, subject in subjects.items():
        if name in ENGINES:
            subject.engine.close()
