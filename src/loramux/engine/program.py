"""What the adapters of a step add at every site: pair arrays, filled by what is fixed and by routers as they run.

An `Entry` is one adapter acting on one sequence's tokens. Its pairs (token, slot) lie side by side, token by token,
in one array shared by all sites; their weights are a matrix [S, P], or one row where no entry's weights differ
between sites. A router fills in its entry's weights when its module's input arrives; what a prompt decided is kept
with the sequence and copied in at once the next time. Decode steps of the same sequences reuse the program: nothing
is lowered twice.

Letters: N tokens of the step, S sites, P pairs, E experts of an entry, n tokens of an entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loramux.engine.facts import Facts, LateUnit
from loramux.engine.sequence import Chunk
from loramux.engine.sequence import Sequence as Sample
from loramux.ops.contract import Pairs


@dataclass(eq=False)
class PromptRoutes:
    """What a sequence's prompt decided: per part of its mix, weights [S, E]. `done` once the prompt has run."""

    weights: dict[int, Tensor] = field(default_factory=dict)
    done: bool = False


@dataclass(eq=False)
class Entry:
    """One adapter and the tokens first..first+count-1 of the packed row. `pair`: where its pairs begin."""

    sample: Sample
    part: int
    content: Any
    facts: Facts
    slots: tuple[int, ...]
    weight: float
    first: int
    count: int
    prompt_left: int  # how many of its tokens belong to the prompt
    pair: int = 0

    @property
    def width(self) -> int:
        return self.facts.num_plain

    @property
    def num_pairs(self) -> int:
        return self.count * self.width

    @property
    def pairs(self) -> slice:
        return slice(self.pair, self.pair + self.num_pairs)

    @property
    def tokens(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def routes(self) -> PromptRoutes:
        if self.sample.routes is None:
            self.sample.routes = PromptRoutes()
        routes: PromptRoutes = self.sample.routes
        return routes

    def fail(self, message: str) -> None:
        """End its request after this step; the others do not notice."""
        self.sample.failure = message

    def is_decided(self) -> bool:
        """Whether its prompt routers have run already."""
        return self.sample.routes is not None and self.routes.done


class Program:
    """The pairs of one step. `has_work` is False where every token runs the bare base."""

    def __init__(self, chunks: Sequence[Chunk], num_sites: int, device: torch.device):
        self.num_sites, self.device = num_sites, device
        self.entries = list(_entries(chunks))
        self.num_tokens = sum(chunk.count for chunk in chunks)
        self.is_decode = all(chunk.count == 1 and chunk.samples for chunk in chunks)
        self.calls: dict[int, Any] = {}  # group number -> what it calls, see engine/linear.py
        self.blocks: dict[str, Any] = {}  # FFN block -> its rows, see engine/blockrows.py
        self._pairs: dict[int, Pairs] = {}
        self.uses_dora = any(entry.content.packed.gain_at is not None for entry in self.entries)
        pair = 0
        for entry in self.entries:
            entry.pair = pair
            pair += entry.num_pairs
        self.num_pairs = pair
        prompted = [e for e in self.entries if e.facts.routes_on_prompt]
        self.differs = bool(prompted) or any(
            e.facts.layers or e.facts.sited or e.facts.hidden or not _runs_in_kernel(e)
            for e in self.entries
        )
        self.token, self.slot = self._index()
        self.weight = self._weights()

    # --- Arrays ---------------------------------------------------------------------------------

    def _index(self) -> tuple[Tensor, Tensor]:
        tokens, slots = [], []
        for entry in self.entries:
            if entry.width == 0:
                continue
            own = torch.arange(entry.first, entry.first + entry.count, dtype=torch.int32)
            tokens.append(own.repeat_interleave(entry.width))
            slots.append(
                torch.tensor(entry.slots[: entry.width], dtype=torch.int32).repeat(entry.count)
            )
        if not tokens:
            empty = torch.zeros(0, dtype=torch.int32, device=self.device)
            return empty, empty
        return torch.cat(tokens).to(self.device), torch.cat(slots).to(self.device)

    def _weights(self) -> Tensor:
        """[S, P], or [1, P] where nothing differs between sites. Entries not yet decided stay at their mix weight."""
        rows = self.num_sites if self.differs else 1
        weight = torch.ones(rows, self.num_pairs, dtype=torch.float32)
        for entry in self.entries:
            if entry.num_pairs == 0:
                continue
            if entry.weight != 1:
                weight[:, entry.pairs] = entry.weight
            if entry.is_decided():
                own_SE = entry.routes.weights.get(entry.part)
                if own_SE is not None:
                    weight[:, entry.pairs] *= own_SE[:, : entry.width].repeat(1, entry.count)
        return weight.to(self.device)

    def row_of(self, site: int) -> int:
        """Which row of `weight` a site reads."""
        return site if self.differs else 0

    def pairs_at(self, site: int) -> Pairs | None:
        """The pairs at a site outside row blocks; their weights are a view, so later fills are seen."""
        if self.num_pairs == 0:
            return None
        row = self.row_of(site)
        found = self._pairs.get(row)
        if found is None:
            found = self._pairs[row] = Pairs(
                self.token,
                self.token,
                self.slot,
                self.weight[row],
                self.num_tokens,
                self.num_tokens,
            )
        return found

    # --- Filling --------------------------------------------------------------------------------

    def fill(self, entry: Entry, sites: Sequence[int], gate_nE: Tensor) -> None:
        """Set an entry's weights at some sites: [n, E] per token, times its weight in the mix."""
        flat = (gate_nE[:, : entry.width] * entry.weight).reshape(-1).to(self.weight)
        if self.differs and len(sites) == 1:
            self.weight[sites[0], entry.pairs] = flat
        elif self.differs:
            self.weight[torch.tensor(sites), entry.pairs] = flat
        else:
            self.weight[0, entry.pairs] = flat

    def keep(self, entry: Entry, sites: Sequence[int], gate_E: Tensor) -> None:
        """Remember with the sequence what its prompt decided at some sites."""
        kept = entry.routes.weights.get(entry.part)
        if kept is None:
            kept = torch.ones(self.num_sites, len(entry.slots), dtype=torch.float32)
            entry.routes.weights[entry.part] = kept
        kept[torch.tensor(sites)] = gate_E.detach().to("cpu", torch.float32)

    def settle(self) -> None:
        """The forward is over: prompts that ran whole have decided."""
        for entry in self.entries:
            if entry.facts.routes_on_prompt and entry.prompt_left:
                entry.routes.done = True

    @cached_property
    def late(self) -> dict[str, list[tuple[Entry, LateUnit]]]:
        """Late gates still to run, by the path of the site they read at."""
        found: dict[str, list[tuple[Entry, LateUnit]]] = {}
        for entry in self.entries:
            for path, unit in entry.facts.late.items():
                if unit.router.when == "prompt" and entry.is_decided():
                    continue
                found.setdefault(path, []).append((entry, unit))
        return found

    @cached_property
    def has_hidden(self) -> bool:
        """Whether some tokens run the bare base first, in every step."""
        return any(entry.facts.hidden for entry in self.entries)

    @cached_property
    def layers(self) -> dict[str, list[Entry]]:
        """Entries whose router at a layer or block still has to run, by module path; row blocks come apart."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for path, router in entry.facts.layers.items():
                if router.when != "prompt" or not entry.is_decided():
                    found.setdefault(path, []).append(entry)
        return found

    @cached_property
    def sited(self) -> dict[str, list[Entry]]:
        """Entries whose router at a linear still has to run, by the linear's path."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for path, router in entry.facts.sited.items():
                if router.when != "prompt" or not entry.is_decided():
                    found.setdefault(path, []).append(entry)
        return found

    @cached_property
    def sited_alike(self) -> dict[str, list[list[Entry]]]:
        """The same, in lists that one call can ask for: tokens that decode under one content; all else by itself."""
        found: dict[str, list[list[Entry]]] = {}
        for path, entries in self.sited.items():
            lists = found[path] = []
            by_content: dict[int, list[Entry]] = {}
            for entry in entries:
                decodes = entry.count == 1 and not entry.prompt_left
                if not decodes or entry.facts.sited[path].when == "prompt":
                    lists.append([entry])
                elif id(entry.content) in by_content:
                    by_content[id(entry.content)].append(entry)
                else:
                    by_content[id(entry.content)] = [entry]
                    lists.append(by_content[id(entry.content)])
        return found

    @cached_property
    def routed_blocks(self) -> dict[str, list[Entry]]:
        """Entries that turn the tokens of an FFN block into rows, by the block's path."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for path in entry.facts.blocks:
                found.setdefault(path, []).append(entry)
        return found


def _runs_in_kernel(entry: Entry) -> bool:
    """Whether all its routers do, so that their weights need no place of their own at every site."""
    facts = entry.facts
    late = all(unit.gate is not None for unit in facts.late.values())
    return late and all(block.gate is not None for block in facts.blocks.values())


def _entries(chunks: Sequence[Chunk]) -> Iterator[Entry]:
    first = 0
    for chunk in chunks:
        sample = chunk.sequence
        prompt_left = max(0, min(chunk.count, sample.num_prompt - chunk.start))
        for part, leased in enumerate(sample.lease.parts if sample.lease is not None else ()):
            yield Entry(
                sample, part, leased.content, leased.content.facts, tuple(leased.slots),
                leased.weight, first, chunk.count, prompt_left,
            )  # fmt: skip
        first += chunk.count
