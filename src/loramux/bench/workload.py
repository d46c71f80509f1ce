"""Traffic for the serving benchmark: who asks when, which adapter, how long. Pure functions of a seed.

Arrivals are a Poisson process; adapters are drawn by Zipf's law: a few are popular and most are rare. The lengths of
prompts and answers are uniform between two limits. Nothing here knows a clock or a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Traffic:
    """What arrives. rate: requests per second, inf for all at once; zipf: exponent of popularity, 0 for uniform.

    prompt, answer: least and largest number of tokens.
    """

    requests: int
    adapters: int
    vocab: int
    rate: float = math.inf
    zipf: float = 1.0
    prompt: tuple[int, int] = (32, 256)
    answer: tuple[int, int] = (16, 128)

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("adapters", 1), ("vocab", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0 requests per second, got {self.rate}")
        if not 0 <= self.zipf < math.inf:
            raise ValueError(f"zipf must be a finite exponent of at least 0, got {self.zipf}")
        for name in ("prompt", "answer"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} must be (least, most) with 1 <= least <= most")


@dataclass(frozen=True)
class Arrival:
    """One request to be: when it comes (seconds), the index of its adapter, its prompt, how many tokens it wants."""

    at: float
    adapter: int
    prompt: tuple[int, ...]
    answer: int


def poisson_times(rate: float, count: int, rng: random.Random) -> list[float]:
    """Arrival times of a Poisson process, the first after its first gap; all 0 for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    return list(accumulate(rng.expovariate(rate) for _ in range(count)))


def zipf_shares(count: int, exponent: float) -> list[float]:
    """The share of each adapter, most popular first: proportional to 1 / rank ** exponent, summing to 1."""
    raw = [1.0 / rank**exponent for rank in range(1, count + 1)]
    total = math.fsum(raw)
    return [share / total for share in raw]


def make_traffic(traffic: Traffic, seed: int) -> list[Arrival]:
    """The requests in order of arrival. Same arguments, same requests.

    Times, adapters, lengths and tokens come from generators of their own: another rate brings the same requests at
    other times, another number of adapters the same prompts to other adapters.
    """
    own = {name: random.Random(f"{seed} {name}") for name in ("at", "adapter", "length", "tokens")}
    times = poisson_times(traffic.rate, traffic.requests, own["at"])
    shares = zipf_shares(traffic.adapters, traffic.zipf)
    adapters = own["adapter"].choices(range(traffic.adapters), shares, k=traffic.requests)
    made = []
    for at, adapter in zip(times, adapters, strict=True):
        length = own["length"].randint(*traffic.prompt)
        answer = own["length"].randint(*traffic.answer)
        prompt = tuple(own["tokens"].randrange(traffic.vocab) for _ in range(length))
        made.append(Arrival(at, adapter, prompt, answer))
    return made


def total_answer(arrivals: Sequence[Arrival]) -> int:
    """Tokens that were asked for."""
    return sum(arrival.answer for arrival in arrivals)
