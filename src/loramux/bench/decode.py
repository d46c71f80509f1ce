"""Decode steps of every subject: one token per request behind a prompt, its KV cache filled by the subject itself.

The cache is cut back after each measurement, so that the context does not grow from round to round. The first step
of a measurement is not timed: it fetches weights that other subjects pushed out of the processor's cache.

MiLoRA and LoRA differ by about a percent, which rounds of that kind do not resolve. They are compared once more over
one set of base weights, a single step at a time and many times: what disturbs a step disturbs its neighbours too.

Letters: B requests, T prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loramux.bench import subjects as s
from loramux.bench.progress import Begin
from loramux.bench.rounds import Measure, cpu_seconds, interleave
from loramux.bench.shape import Effort
from loramux.bench.table import Compared, Row, compare

ROWS = (
    Compared("decode", s.LORA, s.BARE, "lora/bare", s.BARE_COPY),
    Compared("decode", s.LORA_FP32, s.BARE, "lora/bare", s.BARE_COPY),
    Compared("decode", s.LORA, s.PEFT, "lora/peft"),
    Compared("decode", s.LORA_FP32, s.PEFT_FP32, "lora/peft"),
    Compared("decode", s.MILORA, s.LORA, None, s.LORA_COPY),
    Compared("decode", s.MILORA, s.BARE, None, s.BARE_COPY),
    Compared("decode", s.MIXLORA, s.BARE, "mixlora/bare", s.BARE_COPY),
    Compared("decode", s.MIXLORA, s.PACKAGE),
    Compared("decode", s.PEFT, s.BARE, None, s.BARE_COPY),
    Compared("decode", s.PACKAGE, s.BARE, None, s.BARE_COPY),
    Compared("control", s.BARE_COPY, s.BARE, None, s.BARE_COPY, adapters=0),
    Compared("control", s.LORA_COPY, s.LORA, None, s.LORA_COPY),
)
CLOSE_ROWS = (
    Compared("decode, one base", s.MILORA, s.LORA, "milora/lora", s.LORA_COPY),
    Compared("control, one base", s.LORA_COPY, s.LORA, None, s.LORA_COPY),
)
ALIKE = {  # computes the same as
    s.BARE_COPY: s.BARE,
    s.LORA_COPY: s.LORA,
    s.LORA_FP32: s.LORA,
    s.PEFT: s.LORA,
    s.PEFT_FP32: s.LORA,
    s.PACKAGE: s.MIXLORA,
}
ONE_REQUEST = ("mixlora/bare",)  # targets that hold for batch 1 only


class Decoder:
    """One subject behind its own prompt; a call gives the seconds of `steps` decode steps after `warm` others.

    picks: a step also chooses the next tokens (greedy), as an engine's step does.
    """

    def __init__(
        self, model: Any, prompt_BT: torch.Tensor, steps: int, warm: int = 1, picks: bool = False
    ):
        from transformers import DynamicCache

        self.model, self.warm, self.total, self.picks = model, warm, warm + steps, picks
        batch, length = prompt_BT.shape
        self.cache = DynamicCache(config=model.config)
        # generate() passes tokens and the growing mask like this.
        self.tokens = [prompt_BT[:, i : i + 1].contiguous() for i in range(self.total)]
        self.masks = [torch.ones(batch, length + i + 1).long() for i in range(self.total)]
        with torch.no_grad():
            model(prompt_BT, attention_mask=torch.ones_like(prompt_BT), past_key_values=self.cache)

    def step(self, i: int) -> torch.Tensor:
        out = self.model(
            self.tokens[i],
            attention_mask=self.masks[i],
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.logits  # type: ignore[no-any-return]

    def __call__(self) -> float:
        with torch.no_grad():
            for i in range(self.warm):
                self.step(i)
            seconds = cpu_seconds(self._timed)
        self.rewind(self.total)
        return seconds

    def rewind(self, steps: int) -> None:
        self.cache.crop(-steps)

    def _timed(self) -> None:
        for i in range(self.warm, self.total):
            logits = self.step(i)
            if self.picks:
                logits[:, -1].argmax(-1).tolist()


def decode_rows(models: Mapping[str, Any], effort: Effort, vocab: int, begin: Begin) -> list[Row]:
    rows = []
    for batch in effort.batches:
        prompt_BT = make_prompt(batch, effort.context, vocab)
        decoders = {name: Decoder(model, prompt_BT, effort.steps) for name, model in models.items()}
        check_outputs(decoders)
        measures: dict[str, Measure] = dict(decoders)
        total = (effort.decode_rounds + 1) * len(measures)
        advance = begin(f"decode, batch {batch}", total)
        seconds = interleave(measures, effort.decode_rounds, seed=batch, done=advance)
        wanted = [row if batch == 1 else _informative(row) for row in ROWS]
        rows += compare(seconds, s.TITLES, wanted, batch=batch, per_call=effort.steps)
    return rows


def close_rows(models: Mapping[str, Any], effort: Effort, vocab: int, begin: Begin) -> list[Row]:
    """MiLoRA against LoRA at batch 1, both over the same base weights."""
    prompt_BT = make_prompt(1, effort.context, vocab)
    decoders = {name: Decoder(model, prompt_BT, 1, warm=0) for name, model in models.items()}
    measures: dict[str, Measure] = dict(decoders)
    advance = begin("decode, one base", (effort.close_rounds + 3) * len(measures))
    seconds = interleave(measures, effort.close_rounds, warmup=3, done=advance)
    return compare(seconds, s.TITLES, CLOSE_ROWS, batch=1, per_call=1)


def make_prompt(batch: int, length: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(vocab, (batch, length), generator=generator)


def _informative(row: Compared) -> Compared:
    if row.target not in ONE_REQUEST:
        return row
    return Compared(row.what, row.variant, row.reference, None, row.control, row.adapters)


def check_outputs(decoders: Mapping[str, Decoder]) -> None:
    """Refuse to time subjects that do not compute what their title says."""
    logits = {}
    for name, decoder in decoders.items():
        with torch.no_grad():
            logits[name] = decoder.step(0).float()
        decoder.rewind(1)
    change = (logits[s.LORA] - logits[s.BARE]).abs().mean()
    for name in logits.keys() - {s.BARE, s.BARE_COPY}:
        if not (logits[name] - logits[s.BARE]).abs().mean() > 0.05 * change:
            raise RuntimeError(f"{s.TITLES[name]} gives the bare model's outputs; not timing that")
    for name, same in ALIKE.items():
        if name in logits and (logits[name] - logits[same]).abs().mean() > 0.2 * change:
            raise RuntimeError(f"{s.TITLES[name]} and {s.TITLES[same]} differ; not comparing them")
