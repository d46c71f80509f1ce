"""Does one item: trains, composes or merely loads, and measures what came of it on the test rows.

An adapter is read back from its folder before it is measured: what is compared is what a user would load. Only the
adapter and its history stay on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from loramux.compare.measure import Meter, Usage, active_parameters, decode_cost
from loramux.compare.schema import SuiteError
from loramux.compare.scoring import score

Work = Mapping[str, Any]
Found = dict[str, Any]
PROBE, RESULT = "probe", "result.json"
EXPERTS = "experts"
LEFT_OVERS = ("checkpoints", "tensorboard", "best")


def carry_out(work: Work, folder: Path, folders: Mapping[str, Path]) -> Found:
    """The results of one item. folder: empty, its adapter goes there; folders: the folder of each item it needs."""
    needs = {name: adapter_of(folders[need]) for name, need in work["needs"].items()}
    adapters = _named(needs, folder.parent / EXPERTS)
    found: Found
    found, adapter = MAKE[work["kind"]](work, folder, adapters)
    return found | measured(work, adapter)


def adapter_of(folder: Path) -> Path:
    return folder / "adapter"


def _named(adapters: Mapping[str, Path], links: Path) -> dict[str, str]:
    """Folders that have the names of the tasks, which become those of the experts: links to the adapters."""
    found = {}
    for name, adapter in adapters.items():
        link = links / name
        links.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(adapter.resolve(), links.resolve()))
        found[name] = str(link)
    return found


def _train(work: Work, folder: Path, adapters: Mapping[str, str]) -> tuple[Found, Path]:
    """A training as `loramux train` does it; over frozen adapters where there are some."""
    from loramux.recipe import parse_recipe
    from loramux.train.run import train_recipe

    raw = dict(work["recipe"])
    if adapters:
        raw["method"] = {**raw["method"], "adapters": list(adapters.values())}
    meter = Meter()
    result = train_recipe(parse_recipe(raw), folder, progress=False, callbacks=[meter], board=False)
    (job,) = result["jobs"]
    if job["tokens"] != work["tokens"] or job["status"] != "finished":
        raise SuiteError(
            f"the training ended as {job['status']!r} after {job['tokens']:,} tokens and not after the "
            f"{work['tokens']:,} that every method of this part sees; such a row cannot be compared"
        )
    for name in LEFT_OVERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    kept = {name: job[name] for name in ("steps", "tokens", "train_loss", "val_loss")}
    return kept | meter.to_dict() | _of_probe(folder), adapter_of(folder)


def _of_probe(folder: Path) -> Found:
    """What a method spent on a training of its own before this one; it is no part of the equal tokens."""
    path = folder / PROBE / RESULT
    if not path.exists():
        return {}
    (job,) = json.loads(path.read_text(encoding="utf-8"))["jobs"]
    shutil.rmtree(folder / PROBE / "checkpoints", ignore_errors=True)
    return {"extra_tokens": job["tokens"], "extra_seconds": round(job["seconds"], 2)}


def _score(work: Work, folder: Path, adapters: Mapping[str, str]) -> tuple[Found, Path | None]:
    """Nothing is made: the bare base, or one adapter as it is."""
    return {}, next((Path(adapter) for adapter in adapters.values()), None)


def _put_together(
    work: Work, folder: Path, adapters: Mapping[str, str]
) -> tuple[Found, Path | None]:
    """One adapter out of several: merged, or behind a router that needs no training."""
    from loramux.compare.fusion import compose, route

    start = time.process_time()
    make = {"compose": compose, "route": route}[work["kind"]]
    about = make(work, adapters, adapter_of(folder))
    seconds, made = round(time.process_time() - start, 2), adapter_of(folder)
    return {"make_seconds": seconds, **about}, made if made.exists() else None


MAKE: dict[str, Any] = {
    "train": _train,
    "score": _score,
    "compose": _put_together,
    "route": _put_together,
}


def measured(work: Work, adapter: Path | None) -> Found:
    """Scores, what acts and is kept, and the decode cost, of the base with this adapter."""
    import loramux
    from loramux.bench.shape import twin_of
    from loramux.eval.loading import load_model

    loaded = load_model(work["base"], dtype=work["dtype"], threads=work["threads"])
    model, found = loaded.model, Found()
    bare = twin_of(model)
    handle = None
    if adapter is not None:
        handle = loramux.load(model, adapter)
        (entry,) = handle.adapters.values()
        found["parameters"] = sum(p.numel() for p in entry.parameters())
        found["servability"] = entry.method.servability
    usage = Usage()
    start = time.process_time()
    with nullcontext() if handle is None else usage.watching(model, handle):
        found["scores"] = score(
            model, loaded.tokenizer, work["tests"], work["metric"], work["eval_batch_size"]
        )
    found["test_seconds"] = round(time.process_time() - start, 2)
    if handle is not None:
        (entry,) = handle.adapters.values()
        found["active"] = round(active_parameters(entry, usage))
        with handle.batch(tasks=[next(iter(work["tests"]))]):  # some adapters go by the task
            found["decode"] = decode_cost(bare, model, work["decode_rounds"])
    return found
