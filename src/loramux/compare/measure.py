"""What an adapter costs: processor time and memory of its training, active parameters, the price of a decode step.

Peak memory is of the process, above what it held when training began, so an item is measured in a process of its own.
Only Linux says it; elsewhere it is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener

if TYPE_CHECKING:
    from torch import Tensor

    from loramux.core.adapter import Adapter
    from loramux.core.types import RouteRecord, Site
    from loramux.train.trainer import JobResult, Trainer

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what the kernel wants to hear
CONTEXT, STEPS = 64, 4  # of a decode measurement: cached tokens, timed steps in a round


class Meter(Listener):
    """Watches one training: CPU seconds of the whole process, peak memory, trainable parameters at both ends."""

    def __init__(self) -> None:
        self.seconds = self._start = time.process_time()
        self.peak_mb: float | None = None
        self.trainable = self.trainable_at_end = 0
        self._held = 0

    def started(self, trainer: Trainer) -> None:
        parameters = list(trainer.runners[0].parameters.values())
        self.trainable = sum(p.numel() for p in parameters)
        # The adapter's own weights are there by now and belong to its price.
        self._held = _resident() - sum(p.numel() * p.element_size() for p in parameters)
        _forget_peak()
        self._start = time.process_time()

    def finished(self, trainer: Trainer, results: Sequence[JobResult]) -> None:
        self.seconds = time.process_time() - self._start
        if STATUS.exists():
            self.peak_mb = round((_peak() - self._held) / 1e6, 1)
        name = trainer.runners[0].job.name
        self.trainable_at_end = sum(
            p.numel() for p in trainer.handle.trainable_parameters(name).values()
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "trainable": self.trainable,
            "trainable_at_end": self.trainable_at_end,
            "train_seconds": round(self.seconds, 2),
            "peak_mb": self.peak_mb,
        }


def _forget_peak() -> None:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return  # the peak of loading then counts too, and is no larger than that of most trainings


def _resident() -> int:
    return _bytes_of("VmRSS")


def _peak() -> int:
    return _bytes_of("VmHWM")


def _bytes_of(field: str) -> int:
    if not STATUS.exists():
        return 0
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


# --- Active parameters ----------------------------------------------------------------------------


@dataclass
class Used:
    """Of one router: its columns, and on how many of `num` tokens (or requests) each was chosen."""

    columns: tuple[str, ...]
    often: Tensor
    num: int

    @property
    def shares(self) -> list[float]:
        return [1.0] * len(self.columns) if self.num == 0 else (self.often / self.num).tolist()


class Usage:
    """What the routers chose over all forward passes that it watched, by the path of the router."""

    def __init__(self) -> None:
        self.by_path: dict[str, Used] = {}

    @contextmanager
    def watching(self, model: Any, handle: Any) -> Iterator[None]:
        hook = model.register_forward_hook(lambda *_: self.add(handle.routing()))
        try:
            yield
        finally:
            hook.remove()

    def add(self, records: Sequence[RouteRecord]) -> None:
        for record in records:
            chosen = record.gates != 0
            chosen = chosen if record.valid is None else chosen[record.valid]
            own = self.by_path.get(record.path)
            often, num = chosen.sum(0).double(), chosen.shape[0]
            if own is not None:
                often, num = often + own.often, num + own.num
            self.by_path[record.path] = Used(record.columns, often, num)


def active_parameters(adapter: Adapter, usage: Usage) -> float:
    """Parameters that act on an average token of the watched passes; routers act on every token.

    A share of a site's experts (or ranks, or the site as a whole) is what its router used of them; where no router
    decided, or none that says what it chose for this very site, all of it.
    """
    total = float(
        sum(p.numel() for router in adapter.routers.values() for p in router.parameters())
    )
    for path, site in adapter.sites.items():
        if path not in adapter.rows:
            continue
        rows = adapter.rows[path]
        shares = _shares(_router_of(adapter, site, usage), site, rows.spans.num_slots)
        for slot, share in enumerate(shares):
            total += share * rows.spans.rank[slot] * (site.d_in * (not rows.tied) + site.d_out)
        total += rows.a.numel() if rows.tied else 0
        if rows.magnitude is not None:
            total += sum(share * site.d_out for share in shares)
        total += sum(p.numel() for p in rows.gate.parameters()) if rows.gate is not None else 0
    return total


def _router_of(adapter: Adapter, site: Site, usage: Usage) -> Used | None:
    """The router that governs a site: the one its method names, else the nearest."""
    governor = adapter.method.governor_of(site)
    if governor is not None:
        return usage.by_path.get(governor)
    places = (adapter.method.unit_of(site), site.path, site.block, site.layer_path)
    return next((usage.by_path[p] for p in places if p is not None and p in usage.by_path), None)


def _shares(used: Used | None, site: Site, num_slots: int) -> list[float]:
    """How often each slot of the site was used, 0 to 1."""
    if used is None:
        return [1.0] * num_slots
    often = used.shares
    if site.name in used.columns:
        return [often[used.columns.index(site.name)]] * num_slots
    if len(often) == num_slots:
        return often
    # Units of several neighbouring slots.
    size, rest = divmod(num_slots, len(often))
    return [share for share in often for _ in range(size)] if not rest else [1.0] * num_slots


# --- Decode cost ----------------------------------------------------------------------------------


def decode_cost(bare: Any, model: Any, rounds: int) -> dict[str, float] | None:
    """CPU time of a decode step over that of the bare base: median of paired rounds, and its 95 % interval."""
    if rounds == 0:
        return None
    from loramux.bench.decode import Decoder, make_prompt
    from loramux.bench.rounds import interleave
    from loramux.bench.stats import paired_ratio

    prompt_BT = make_prompt(1, CONTEXT, model.config.get_text_config().vocab_size)
    subjects = {"bare": Decoder(bare, prompt_BT, STEPS), "model": Decoder(model, prompt_BT, STEPS)}
    seconds = interleave(dict(subjects), rounds)
    found = paired_ratio(seconds["model"], seconds["bare"])
    return {name: round(getattr(found, name), 4) for name in ("value", "low", "high")}
