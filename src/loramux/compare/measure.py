"""What an adapter costs: processor time and memory of its training, active parameters, the price of a decode step.

Peak memory is of the process, above what it held when training began, so an item is measured in a process of its own.
Only Linux says it; elsewhere it is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.train.events import Listener

if TYPE_CHECKING:
    import torch

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


def active_parameters(adapter: Adapter, records: Sequence[RouteRecord]) -> float:
    """Parameters that act on an average token of the last forward pass; routers act on every token.

    A share of a site's experts (or ranks, or the site as a whole) is what the last routing used of them; where no
    router decided, all of it.
    """
    own = {record.path: record for record in records}
    total = float(
        sum(p.numel() for router in adapter.routers.values() for p in router.parameters())
    )
    for path, site in adapter.sites.items():
        if path not in adapter.rows:
            continue
        rows = adapter.rows[path]
        unit = adapter.method.unit_of(site)
        places = (unit, path, site.block, site.layer_path)
        record = next((own[place] for place in places if place in own), None)
        shares = _shares(record, site, rows.spans.num_slots)
        for slot, share in enumerate(shares):
            total += share * rows.spans.rank[slot] * (site.d_in * (not rows.tied) + site.d_out)
        total += rows.a.numel() if rows.tied else 0
        if rows.magnitude is not None:
            total += sum(share * site.d_out for share in shares)
        total += sum(p.numel() for p in rows.gate.parameters()) if rows.gate is not None else 0
    return total


def _shares(record: RouteRecord | None, site: Site, num_slots: int) -> list[float]:
    """How often each slot of the site was used, 0 to 1."""
    if record is None:
        return [1.0] * num_slots
    used = record.gates != 0
    valid: torch.Tensor | None = record.valid
    used = used if valid is None else used[valid]
    often = used.float().mean(0).tolist() if used.shape[0] else [1.0] * used.shape[1]
    if site.name in record.columns:
        return [often[record.columns.index(site.name)]] * num_slots
    if len(often) == num_slots:
        return [float(share) for share in often]
    # Units of several neighbouring slots.
    size, rest = divmod(num_slots, len(often))
    return [float(s) for s in often for _ in range(size)] if not rest else [1.0] * num_slots


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
