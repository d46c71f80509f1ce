"""32 tenants in one batch: makes an adapter for each, then one engine answers all of them over one base model.

Five adapters are trained on the shipped tasks, the others are derived from these in seconds (see derive.py). What is
made already is kept, so an interrupted run goes on where it stopped and a second one goes straight to the answers.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from loramux.demo.derive import Scaled
    from loramux.engine.engine import Engine
    from loramux.engine.request import Completion, Request
    from loramux.formats.tensors import AdapterTensors
    from loramux.recipe import Recipe

LORAS = ("clickbait", "snips", "banking")
MIXTURES = {"milora": "snips", "mixlora": "snips"}  # and the task that its tenant asks for
RANKS = (4, 2, 1)
FACTORS = (0.75, 0.5)
WEIGHTS = (0.7, 0.3)
ANSWER_TOKENS = 12  # at most; an answer ends by itself
RATE_TOKENS = 32  # exactly, where speed is measured
ROUNDS = 3  # of the speed measurement
LIST = "tenants.json"


@dataclass(frozen=True)
class Tenant:
    """Who asks what of which adapter. `how`: where the adapter comes from; `answer`: what the data says is right."""

    tenant: str
    adapter: str
    how: str
    is_trained: bool
    folder: str
    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Source:
    """An adapter to be made. `make`: its rows out of the trained ones named in `parts`; None: it is trained itself."""

    name: str
    how: str
    task: str
    parts: tuple[str, ...] = ()
    make: Callable[[Sequence[AdapterTensors], Any], Scaled] | None = None


def main(out: Path, base: str) -> dict[str, Any]:
    """Make the adapters in `out`, answer, measure; returns what tenants in `out`/report.json hold."""
    import torch

    from loramux import Engine, fetch
    from loramux.eval.loading import load_model
    from loramux.recipe import load_recipe

    say = Console(stderr=True, highlight=False).print
    out = out.resolve()  # what is stored holds paths
    out.mkdir(parents=True, exist_ok=True)
    resolved = str(fetch.resolve_base(base))
    here = Path(__file__).parent
    recipe = load_recipe(here / "tenants.yaml", [f"base={json.dumps(resolved)}"])
    say(f"[bold]1/3[/] Training {len(LORAS)} LoRAs and {len(MIXTURES)} mixtures")
    trained, training_seconds = train(recipe, out)
    began = time.perf_counter()
    loaded = load_model(resolved)
    sources = plan()
    made = make_adapters(loaded.model, sources, trained, out)
    tenants = list_tenants(sources, trained, out)
    say(f"[bold]2/3[/] {len(tenants)} adapters, {made} of them derived just now")
    # Without a prefix cache: no round may profit from the one before.
    with Engine(
        loaded.model, loaded.tokenizer, max_batch=len(tenants), prefix_cache=False
    ) as engine:
        for tenant in tenants:
            engine.add_adapter(tenant.adapter, tenant.folder)
        cold = engine.generate([ask(tenant) for tenant in tenants])
        warm = engine.generate([ask(tenant) for tenant in tenants])
        say(f"[bold]3/3[/] Speed: {ROUNDS} rounds of the batch, and one tenant after the other")
        speed = measure(engine, tenants, [done for (done,) in warm])
    shown = [_row(t, c, w) for t, (c,), (w,) in zip(tenants, cold, warm, strict=True)]
    result = {
        "base": resolved,
        "threads": torch.get_num_threads(),
        "training_seconds": round(training_seconds, 1),
        "other_seconds": round(time.perf_counter() - began, 1),
        "tenants": shown,
        "num_right": {
            "trained": _right([row for row in shown if row["is_trained"]]),
            "derived": _right([row for row in shown if not row["is_trained"]]),
        },
        "speed": speed,
    }
    _write(out / "report.json", result)
    return result


# --- Adapters -------------------------------------------------------------------------------------


def train(recipe: Recipe, out: Path) -> tuple[dict[str, Path], float]:
    """Train what the recipe says, or find it trained; the folder of each adapter, and the seconds of all steps."""
    from loramux.errors import LoramuxError
    from loramux.train.run import train_recipe

    result = train_recipe(recipe, out / "trained", resume=True)
    broken = {job["name"]: job.get("reason") for job in result["jobs"] if not job["adapter"]}
    if broken:
        raise LoramuxError(
            f"these adapters could not be trained: {broken}; remove {out / 'trained'} to start anew"
        )
    folders = {job["name"]: Path(job["adapter"]) for job in result["jobs"]}
    return folders, sum(float(job["seconds"]) for job in result["jobs"])


def plan() -> list[Source]:
    """The 32 adapters: five trained ones, then what is derived from the LoRAs among them."""
    sources = [Source(name, "LoRA, r=8", name) for name in LORAS]
    sources += [
        Source(name, f"{title}, r=8", MIXTURES[name])
        for name, title in (("milora", "MiLoRA"), ("mixlora", "MixLoRA"))
    ]
    for name in LORAS:
        sources += [_truncated(name, rank) for rank in RANKS]
        sources += [_scaled(name, factor) for factor in FACTORS]
        sources += [_restricted(name, kind) for kind in ("attention", "ffn")]
    sources += [_mixed(one, other) for one in LORAS for other in LORAS if one != other]
    return sources


def make_adapters(
    model: Any, sources: Sequence[Source], trained: dict[str, Path], out: Path
) -> int:
    """Derive those that are not there yet; returns how many were made."""
    from loramux.demo.derive import derive
    from loramux.formats.peft import read_peft

    read = {name: read_peft(trained[name]) for name in LORAS}
    made = 0
    for source in sources:
        if source.make is None:
            continue
        make, parts = source.make, [read[name] for name in source.parts]
        folder = out / "derived" / source.name
        made += derive(folder, model, source.how, parts, partial(make, parts, model))
    return made


def list_tenants(sources: Sequence[Source], trained: dict[str, Path], out: Path) -> list[Tenant]:
    """One tenant per adapter, each with a question of its own; also written to `out` for other programs."""
    from loramux.data.tasks import question, read_task

    here = Path(__file__).parent
    rows = {task: read_task(here / "data" / task / "test.jsonl") for task in LORAS}
    tenants = []
    for number, source in enumerate(sources):
        is_trained = source.make is None
        folder = trained[source.name] if is_trained else out / "derived" / source.name
        row = rows[source.task][number]
        tenants.append(
            Tenant(
                tenant=f"tenant-{number + 1:02d}",
                adapter=source.name,
                how=source.how,
                is_trained=is_trained,
                folder=str(folder),
                task=source.task,
                prompt=question(row),
                answer=row.answer,
            )
        )
    _write(out / LIST, [vars(tenant) for tenant in tenants])
    return tenants


def _truncated(name: str, rank: int) -> Source:
    from loramux.demo.derive import truncated

    how = f"{name}, nearest of rank {rank}"
    return Source(f"{name}-r{rank}", how, name, (name,), lambda parts, _: truncated(parts[0], rank))


def _scaled(name: str, factor: float) -> Source:
    from loramux.demo.derive import scaled

    how = f"{name}, scaled by {factor}"
    label = f"{name}-x{factor}"
    return Source(label, how, name, (name,), lambda parts, _: scaled(parts[0], factor))


def _restricted(name: str, kind: str) -> Source:
    from loramux.core.sites import find_sites
    from loramux.demo.derive import restricted

    def make(parts: Sequence[AdapterTensors], model: Any) -> Scaled:
        return restricted(parts[0], {s.path for s in find_sites(model) if s.kind == kind})

    return Source(f"{name}-{kind}", f"{name}, {kind} linears only", name, (name,), make)


def _mixed(one: str, other: str) -> Source:
    from loramux.demo.derive import mixed

    how = f"{WEIGHTS[0]} {one} + {WEIGHTS[1]} {other}, r=16"
    return Source(f"{one}-{other}", how, one, (one, other), lambda parts, _: mixed(parts, WEIGHTS))


# --- Answers and speed ----------------------------------------------------------------------------


def ask(tenant: Tenant, tokens: int | None = None) -> Request:
    """The tenant's question; with `tokens` an answer of exactly that length."""
    from loramux import Request, SamplingParams

    params = SamplingParams(max_tokens=tokens or ANSWER_TOKENS, ignore_eos=tokens is not None)
    return Request(
        prompt=tenant.prompt, adapter=tenant.adapter, tenant=tenant.tenant, params=params
    )


def measure(
    engine: Engine, tenants: Sequence[Tenant], answers: Sequence[Completion]
) -> dict[str, Any]:
    """Tokens per second, prompts included in the time: all tenants in one batch against one after the other.

    A round runs the batch, then every ROUNDS-th tenant by itself, so that all of them were alone once at the end.
    `answers` are theirs from a batch: how many are the same alone, token by token, is counted.
    """
    requests = [ask(tenant, RATE_TOKENS) for tenant in tenants]
    batch, alone = [], []
    num_same = 0
    for first in range(ROUNDS):
        started = time.perf_counter()
        engine.generate(requests)
        batch.append(RATE_TOKENS * len(requests) / (time.perf_counter() - started))
        started = time.perf_counter()
        own = [engine.generate([request])[0][0] for request in requests[first::ROUNDS]]
        alone.append(RATE_TOKENS * len(own) / (time.perf_counter() - started))
        for done, answer in zip(own, answers[first::ROUNDS], strict=True):
            num_same += done.token_ids[: len(answer.token_ids)] == answer.token_ids
    ratios = [many / one for many, one in zip(batch, alone, strict=True)]
    return {
        "batch_tokens_per_second": [round(rate, 1) for rate in batch],
        "alone_tokens_per_second": [round(rate, 1) for rate in alone],
        "times_faster": round(statistics.median(ratios), 2),
        "num_same": num_same,
    }


def _row(tenant: Tenant, cold: Completion, warm: Completion) -> dict[str, Any]:
    ((_, digest, _),) = warm.answered.parts or (("", "", 1.0),)
    return {
        **vars(tenant),
        "text": warm.text.strip(),
        "is_right": warm.text.strip() == tenant.answer,
        "error": warm.error or cold.error,
        "digest": digest,
        "first_token_ms": {
            "cold": round(1000 * cold.first_token_s),
            "warm": round(1000 * warm.first_token_s),
        },
    }


def _right(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {"right": sum(row["is_right"] for row in rows), "of": len(rows)}


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1), encoding="utf-8")
    unfinished.replace(path)
