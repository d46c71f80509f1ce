"""A storm: 64 adapters in 8 slots, replaced under their names every few steps, while random tenants ask for them.

Run it as `python -m loramux.bench.storm`. Every content says a token of its own (see markers.py), so rows of a foreign
content, a stale slot and a cached prefix of the content before all show as a foreign token. Of every answer are checked
all tokens, and that `answered` names contents that its names stood for between the request and its first token; of
some, that their log-probabilities are those of one plain forward with merged weights. In the end nothing may be held.
A second part loads and unloads adapters and watches the memory of the process.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import loramux
from loramux.bench.churn import churn
from loramux.bench.judge import Asked, History, Judge, Outcome
from loramux.bench.markers import (
    HEADS,
    KV_HEADS,
    LAYERS,
    WIDTH,
    WORDS,
    Marked,
    build_base,
    overwrite,
    write_marked,
)
from loramux.bench.progress import Advance, bars
from loramux.bench.shape import one_thread
from loramux.engine.engine import Engine
from loramux.engine.request import Delta, Request, SamplingParams

WAYS = ("other folder", "folder overwritten", "from memory")
BLOCK = 16
BLOCK_BYTES = BLOCK * LAYERS * 2 * KV_HEADS * (WIDTH // HEADS) * 4  # keys and values in fp32
LONGEST = 60
MOST_TOKENS = 24


@dataclass(frozen=True)
class Plan:
    """How much of what. Probabilities are per step; `checked` and `mixed` are per request."""

    steps: int = 50_000
    seed: int = 0
    adapters: int = 64
    versions: int = 4
    slots: int = 8
    open_requests: int = 24
    prompts: int = 24
    in_memory: int = 16
    swap: float = 0.25
    remove: float = 0.02
    abort: float = 0.05
    checked: float = 0.02
    mixed: float = 0.1
    kv_blocks: int = 36


class Storm:
    """One engine and all that happens to it; `judge` knows what is right."""

    def __init__(self, plan: Plan, root: Path):
        self.plan, self.root = plan, root
        self.draw = random.Random(plan.seed)
        self.names = [f"tenant-{i}" for i in range(plan.adapters)]
        base = build_base(plan.adapters * plan.versions, plan.seed)
        contents = write_marked(base, root, self.names, plan.versions, plan.seed)
        self.contents = {(c.name, c.version): c for c in contents}
        self.given = _attach(base, contents[: plan.in_memory])
        text = [self.draw.randrange(WORDS) for _ in range(LONGEST)]
        self.prompts = [self._prompt(text) for _ in range(plan.prompts)]
        self.engine = Engine(
            copy.deepcopy(base), kv_memory=plan.kv_blocks * BLOCK_BYTES, block_size=BLOCK,
            adapter_memory="3MiB", max_slots=plan.slots, max_batch=16, max_chunk=16, max_step_tokens=128,
        )  # fmt: skip
        self.outcome, self.history = Outcome(), History(self.names)
        said = {tuple(prompt): _answer(base, prompt) for prompt in self.prompts}
        self.judge = Judge(base, said, self._digests(contents), self.history, self.outcome)
        self.open: dict[str, Asked] = {}
        self._in_place: set[str] = set()  # names that stand for a folder of their own
        for name in self.names:
            self._swap(name)

    def _digests(self, contents: Iterable[Marked]) -> dict[str, Marked]:
        found = {self.engine.store.add("probe", c.folder): c for c in contents}
        self.engine.remove_adapter("probe")
        return found

    def _prompt(self, text: Sequence[int]) -> list[int]:
        """Prompts begin alike, so that a prefix of the wrong content would be found if it could be."""
        common = self.draw.randrange(len(text))
        return [
            *text[:common],
            *(self.draw.randrange(WORDS) for _ in range(self.draw.randint(1, 8))),
        ]

    def _some_name(self, names: Sequence[str]) -> str:
        """The first names are asked for, and replaced, far more often than the last."""
        return names[int(len(names) * self.draw.random() ** 3)]

    def run(self, advance: Advance | None = None) -> Outcome:
        """All steps, then the end of what is under way, then the books."""
        engine = self.engine
        while engine.steps < self.plan.steps:
            self._happen()
            before = engine.steps
            self._step()
            if advance is not None and engine.steps > before:
                advance()
            if engine.steps % 50 == 0:
                engine.check_integrity()
                engine.scheduler.check_integrity()
        while engine.has_work():
            self._step()
        self._check_books()
        engine.close()
        return self.outcome

    # --- What happens -----------------------------------------------------------------------------

    def _happen(self) -> None:
        draw, plan = self.draw, self.plan
        while len(self.open) < plan.open_requests and draw.random() < 0.7:
            self._ask()
        if draw.random() < plan.swap:
            self._swap(self._some_name(self.names))
        if draw.random() < plan.remove:
            self._remove(self._some_name(self.names))
        if self.open and draw.random() < plan.abort:
            self.engine.abort(draw.choice(list(self.open)))
            self._collect()

    def _swap(self, name: str) -> None:
        """Another version under the same name, in one of three ways."""
        now = self.history.now(name)
        others = [v for v in range(self.plan.versions) if now is None or v != now.version]
        content = self.contents[name, self.draw.choice(others)]
        way = self.draw.choice(WAYS)
        given = self.given.get(content)
        if way == "from memory" and given is not None:
            self.engine.add_adapter(name, given)
        elif way == "folder overwritten":
            own = self.root / "own" / name
            overwrite(own, content.folder)
            if name not in self._in_place:
                self.engine.add_adapter(name, own)
        else:
            way = "other folder"
            self.engine.add_adapter(name, content.folder)
        if way == "folder overwritten":
            self._in_place.add(name)
        else:
            self._in_place.discard(name)
        self.history.put(name, content)
        self.outcome.counts[f"swaps, {way}"] += 1

    def _remove(self, name: str) -> None:
        if self.history.now(name) is not None:
            self.engine.remove_adapter(name)
            self.history.put(name, None)
            self._in_place.discard(name)
            self.outcome.counts["removals"] += 1

    def _ask(self) -> None:
        draw = self.draw
        known = [name for name in self.names if self.history.now(name) is not None]
        first, second = self._some_name(known), draw.choice(known)
        kind = draw.random()
        adapter: Any = first
        if kind < self.plan.mixed:
            adapter = None
        elif kind < 2 * self.plan.mixed and first != second:
            # Little of the second, or none of the two would say its token.
            adapter = {first: 1.0, second: 0.05}
        params = SamplingParams(
            max_tokens=draw.randint(1, MOST_TOKENS), ignore_eos=True, n=2 if draw.random() < 0.1 else 1,
            logprobs=3 if draw.random() < self.plan.checked else None,
        )  # fmt: skip
        request = Request(
            prompt=draw.choice(self.prompts), adapter=adapter, params=params,
            tenant=f"t{draw.randrange(2)}",
        )  # fmt: skip
        since = self.history.mark([name for name, _ in request.mix])
        self.open[self.engine.add_request(request)] = Asked(request, since)
        self.outcome.counts["requests"] += 1

    def _step(self) -> None:
        deltas: list[Delta] = self.engine.step()
        for delta in deltas:
            asked = self.open.get(delta.request_id)
            if asked is not None and asked.until is None:
                asked.until = self.history.mark(asked.names)
        self._collect()

    def _collect(self) -> None:
        for request_id, asked in list(self.open.items()):
            done = self.engine.completion(request_id)
            if done is not None:
                del self.open[request_id]
                for completion in done:
                    self.judge.check(asked, completion)

    def _check_books(self) -> None:
        engine, counts = self.engine, self.outcome.counts
        engine.check_integrity()
        engine.scheduler.check_integrity()
        stats = engine.store.stats()
        held = engine.blocks.num_blocks - engine.blocks.num_free
        left = (held, stats.num_leases, stats.num_slots_pinned, stats.num_waiting)
        if any(left):
            self.outcome.add(f"blocks, leases, pinned slots and tickets still held: {left}")
        counts["steps"] = engine.steps
        counts["loads"], counts["loads failed"] = stats.num_loads, stats.num_failed_loads
        counts["slot evictions"] = stats.num_slot_evictions
        counts["memory evictions"] = stats.num_memory_evictions


def _attach(base: Any, contents: Sequence[Marked]) -> dict[Marked, Any]:
    """These contents on a twin of the base: adapters to be given to the engine without a folder."""
    twin = copy.deepcopy(base)
    first, *others = contents
    handle = loramux.load(twin, first.folder, name="0")
    for number, content in enumerate(others, 1):
        handle.load(content.folder, name=str(number))
    return {content: handle.adapters[str(number)] for number, content in enumerate(contents)}


@torch.no_grad()
def _answer(base: Any, prompt: Sequence[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(MOST_TOKENS):
        ids.append(int(base(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m loramux.bench.storm", description=_FIRST_LINE)
    parser.add_argument("--steps", type=int, default=Plan.steps, help="decode steps of the storm")
    parser.add_argument("--cycles", type=int, default=2_000, help="loads and unloads")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to a file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.cycles < 1:
        parser.error(
            f"--steps and --cycles must be at least 1, got {given.steps} and {given.cycles}"
        )
    with one_thread(), bars(not given.quiet) as begin, tempfile.TemporaryDirectory() as root:
        storm = Storm(Plan(steps=given.steps, seed=given.seed), Path(root, "storm"))
        outcome = storm.run(begin("storm", given.steps))
        loads = churn(given.cycles, Path(root, "loads"), begin("loads and unloads", given.cycles))
    result = {"seed": given.seed, "storm": outcome.to_dict(), "loads": loads.to_dict()}
    text = json.dumps(result, indent=2)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    problems = [*outcome.problems, *loads.problems]
    sys.stdout.write("".join(f"PROBLEM: {problem}\n" for problem in problems) or "all held\n")
    return 1 if problems else 0


_FIRST_LINE = (__doc__ or "").splitlines()[0]

if __name__ == "__main__":
    sys.exit(main())
