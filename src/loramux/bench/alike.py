"""Whether a real base answers alike alone and in a crowd: `python -m loramux.bench.alike BASE`.

Requests to plain, prompt-routed, token-routed and gated adapters, weighted mixes and the base arrive at random, with
little memory for keys and values, so that prompts run in pieces and sequences are preempted. What the engine reports
of its most likely tokens is compared with one plain forward of the library's own model over the whole text, or, for
mixes, with the engine's answer to that request alone. In fp32; the bare model differs as much between batch sizes.

Letters: T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loramux
from loramux.bench.adapters import by_name, save_tenants
from loramux.bench.progress import Begin, bars
from loramux.bench.shape import one_thread
from loramux.engine.engine import Engine
from loramux.engine.request import Completion, Request, SamplingParams

TOLERANCE = 1e-5  # times the largest logit
TOP = 50
MOST_TOKENS = 12
PROMPT = (4, 96)
COUNTS = {"plain": 12, "milora": 3, "mixlora": 3, "gated": 3}


@dataclass
class Alike:
    """worst: the largest difference of a log-probability over the largest logit, by kind of request."""

    requests: int
    preemptions: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        return [
            f"{kind}: off by {off:.2e} of the largest logit, allowed {TOLERANCE:.0e}"
            for kind, off in self.worst.items()
            if not off <= TOLERANCE
        ]

    def note(self, kind: str, off: float) -> None:
        self.worst[kind] = max(off, self.worst.get(kind, 0.0))


def compare(model: Any, root: Path, count: int, seed: int, begin: Begin) -> Alike:
    """`model` in fp32; it is used for the reference, and a copy of it serves."""
    draw = random.Random(seed)
    tenants = save_tenants(
        model, root, **COUNTS, done=begin("making adapters", sum(COUNTS.values()))
    )
    folders = by_name([*tenants.plain, *tenants.milora, *tenants.mixlora, *tenants.gated])
    requests = [_request(draw, folders, i, model.config.vocab_size) for i in range(count)]
    found = Alike(count)
    # Room for the longest request three times over.
    room = 3 * (PROMPT[1] + MOST_TOKENS) * _token_bytes(model)
    with Engine(copy.deepcopy(model), kv_memory=room, max_chunk=32) as engine:
        for name, folder in folders.items():
            engine.add_adapter(name, folder)
        done = _drive(engine, requests, draw, begin)
        found.preemptions = sum(completion.preemptions for completion in done.values())
        advance = begin("mixes alone", count)
        for request in requests:
            if len(request.mix) > 1:
                ((alone,),) = engine.generate([_again(request)])
                _hold(found, "mix", done[str(request.id)], alone)
            advance()
    _against_the_library(found, model, folders, requests, done, begin)
    return found


def _request(draw: random.Random, folders: Mapping[str, Path], i: int, vocab: int) -> Request:
    prompt = [draw.randrange(vocab) for _ in range(draw.randint(*PROMPT))]
    plain = [name for name in folders if name.startswith("plain")]
    adapter: Any = draw.choice([None, *folders])
    if draw.random() < 0.15:
        adapter = dict(zip(draw.sample(plain, 2), (0.7, 0.3), strict=True))
    params = SamplingParams(max_tokens=draw.randint(2, MOST_TOKENS), ignore_eos=True, logprobs=TOP)
    return Request(prompt=prompt, adapter=adapter, params=params, id=f"r{i}", tenant=f"t{i % 5}")


def _again(request: Request) -> Request:
    return Request(
        prompt=request.prompt, adapter=request.adapter, params=request.params, salt="alone"
    )


def _token_bytes(model: Any) -> int:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * int(config.num_hidden_layers * config.num_key_value_heads * width)


def _drive(
    engine: Engine, requests: Sequence[Request], draw: random.Random, begin: Begin
) -> dict[str, Completion]:
    """Requests that arrive at random steps."""
    coming, waiting = list(requests), set[str]()
    done: dict[str, Completion] = {}
    advance = begin("in a crowd", len(requests))
    while coming or waiting:
        while coming and (not waiting or draw.random() < 0.8):
            waiting.add(engine.add_request(coming.pop()))
        engine.step()
        engine.check_integrity()
        for name in sorted(waiting):
            ended = engine.completion(name)
            if ended is not None:
                waiting.discard(name)
                if ended[0].error is not None:
                    raise RuntimeError(f"{name} ended with an error: {ended[0].error}")
                done[name] = ended[0]
                advance()
    return done


def _hold(found: Alike, kind: str, one: Completion, other: Completion) -> None:
    """Two answers of the engine: as far as they drew the same tokens."""
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        known = dict(theirs.top)
        largest = max(1.0, *(abs(logprob) for _, logprob in theirs.top))
        for token, logprob in mine.top:
            if token in known:
                found.note(kind, abs(logprob - known[token]) / largest)
        if mine.token != theirs.token:
            return


def _against_the_library(
    found: Alike,
    model: Any,
    folders: Mapping[str, Path],
    requests: Sequence[Request],
    done: Mapping[str, Completion],
    begin: Begin,
) -> None:
    advance = begin("one plain forward each", len(requests))
    for name in [None, *folders]:
        own = [r for r in requests if r.adapter == name]
        handle = None if name is None or not own else loramux.load(model, folders[name])
        kind = "base" if name is None else name.partition("-")[0]
        for request in own:
            completion = done[str(request.id)]
            logits_TV = _plain_logits(model, handle, request, completion)
            largest = max(1.0, float(logits_TV.abs().max()))
            rows_TV = logits_TV.log_softmax(-1)
            for row_V, given in zip(rows_TV, completion.logprobs, strict=True):
                tokens = torch.tensor([token for token, _ in given.top])
                theirs = torch.tensor([logprob for _, logprob in given.top])
                found.note(kind, float((row_V[tokens] - theirs).abs().max()) / largest)
            advance()
        if handle is not None:
            handle.detach()


@torch.no_grad()
def _plain_logits(model: Any, handle: Any, request: Request, completion: Completion) -> Tensor:
    prompt = list(request.prompt)
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    first, last = len(prompt) - 1, ids.shape[1] - 1
    if handle is None:
        logits: Tensor = model(input_ids=ids).logits
    else:
        mask = (torch.arange(ids.shape[1]) < len(prompt)).unsqueeze(0)
        with handle.batch(adapters=["default"], prompt_mask=mask):
            logits = model(input_ids=ids).logits
    return logits[0, first:last]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if an answer differs."""
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.alike", description=_FIRST_LINE)
    parser.add_argument("base", help="folder of a checkpoint")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to a file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.float32).eval()
    with one_thread(), bars(not given.quiet) as begin, tempfile.TemporaryDirectory() as root:
        found = compare(model, Path(root), given.requests, given.seed, begin)
    result = {
        "base": str(given.base),
        "seed": given.seed,
        "requests": found.requests,
        "preemptions": found.preemptions,
        "worst": found.worst,
        "problems": found.problems,
    }
    text = json.dumps(result, indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    sys.stdout.write("".join(f"PROBLEM: {p}\n" for p in found.problems) or "all alike\n")
    return 1 if found.problems else 0


_FIRST_LINE = (__doc__ or "").splitlines()[0]

if __name__ == "__main__":
    sys.exit(main())
