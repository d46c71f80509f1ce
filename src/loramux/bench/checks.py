"""Engines are only timed if they compute what their title says: their first tokens against the library's own model.

The reference is `loramux.load` on a twin of the base, one request at a time. Compared are the log probabilities of the
tokens that the engine finds most likely. In bf16 the two differ by rounding; an adapter must move them by far more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import loramux
from loramux.bench.shape import twin_of
from loramux.bench.streams import Asked, drain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOP = 20
SHARE = 0.25  # of what the adapter changes: more than rounding explains
ROUNDING = 0.05  # without an adapter
PROMPT = 12


class Reference:
    """Answers of the library's own model, kept so that several engines can be held against them."""

    def __init__(self, model: PreTrainedModel, folders: Mapping[str, Path], vocab: int):
        self.model, self.folders = twin_of(model), folders
        generator = torch.Generator().manual_seed(17)
        self.prompt = torch.randint(vocab, (PROMPT,), generator=generator).tolist()
        self.known: dict[str | None, torch.Tensor] = {}

    def logprobs(self, name: str | None) -> torch.Tensor:
        """[V], of the token after the prompt, in fp32."""
        if name not in self.known:
            handle = None if name is None else loramux.load(self.model, self.folders[name])
            with torch.no_grad():
                logits_V = self.model(torch.tensor([self.prompt])).logits[0, -1].float()
            if handle is not None:
                handle.detach()
            self.known[name] = logits_V.log_softmax(-1)
        return self.known[name]

    def check(self, engine: Any, title: str, asked: Sequence[Asked], most: int = 3) -> None:
        """Raise RuntimeError unless `engine` answers as the reference, for the first `most` different adapters."""
        names = [name for name in dict.fromkeys(asked) if name is None or isinstance(name, str)]
        for name in names[:most]:
            tokens, found = _top(engine, self.prompt, name)
            expected, bare = (self.logprobs(n)[tokens] for n in (name, None))
            change = float((expected - bare).abs().mean())
            tolerance = ROUNDING if name is None else SHARE * change
            wrong = float((found - expected).abs().mean())
            if not wrong <= tolerance:
                raise RuntimeError(
                    f"{title}: the answer with {name or 'no adapter'} is off by {wrong:.3g} in log probability, "
                    f"more than {tolerance:.3g}; not timing that"
                )


def _top(engine: Any, prompt: list[int], asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely first tokens and the logarithms of their probabilities."""
    from loramux.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=TOP)
    request = engine.add_request(Request(prompt=prompt, adapter=asked, params=params))
    drain(engine)
    (completion,) = engine.completion(request)
    if completion.error is not None:
        raise RuntimeError(f"a request with {asked!r} failed: {completion.error}")
    (first,) = completion.logprobs
    tokens, values = zip(*first.top, strict=True)
    return torch.tensor(tokens), torch.tensor(values)
