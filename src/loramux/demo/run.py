"""The demo from end to end: measure the base, train one mixture over several tasks, measure again, show its routing.

Every stage leaves its result in the folder, so an interrupted demo goes on where it stopped, and a finished one is
only written out again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS = 200  # of each task's test file
SAMPLES = 2  # prompts decoded per task
ROUTED = 64  # prompts per task in the routing pictures
NEW_TOKENS = 12
TITLE = "One MiLoRA over four tasks"


def main(out: Path, base: str) -> dict[str, Any]:
    """Run the demo into `out`; returns what report.json holds."""
    import torch

    from loramux import fetch, load
    from loramux.eval.loading import load_model
    from loramux.eval.run import evaluate_model, read_tasks
    from loramux.recipe import load_recipe
    from loramux.report.routing import observe
    from loramux.report.write import join_scores, write_report
    from loramux.train.run import train_recipe

    started = time.perf_counter()
    say = Console(stderr=True, highlight=False).print
    out.mkdir(parents=True, exist_ok=True)
    resolved = str(fetch.resolve_base(base))
    here = Path(__file__).parent
    recipe = load_recipe(here / "demo.yaml", [f"base={json.dumps(resolved)}"])
    tests = [here / "data" / task / "test.jsonl" for task in _tasks(recipe)]
    rows = read_tasks(tests, ROWS)
    prompts = [row.prompt for task in rows.values() for row in task[:SAMPLES]]

    say(f"[bold]1/3[/] The base model on {ROWS} test rows of {', '.join(rows)}")
    loaded = load_model(resolved)
    model, tokenizer = loaded.model, loaded.tokenizer
    base_digest = base_stamp(resolved)
    seconds = time.perf_counter() - started

    def measure(title: str) -> dict[str, Any]:
        scores = evaluate_model(model, tokenizer, rows, title=title)
        return {"scores": scores, "texts": _answers(model, tokenizer, prompts)}

    stamp = _digest(base_digest, *tests)
    before = _once(out / "before.json", stamp, lambda: measure("Before"))

    say(f"[bold]2/3[/] Training on {torch.get_num_threads()} threads")
    trained = train_recipe(recipe, out, resume=True)

    say("[bold]3/3[/] The same rows with the adapter, read back from its folder")
    load(model, out / "adapter")
    stamp = _digest(base_digest, *sorted((out / "adapter").rglob("*.safetensors")), *tests)
    after = _once(out / "after.json", stamp, lambda: measure("After"))
    started = time.perf_counter()
    routing = observe(model, tokenizer, rows, rows=ROUTED)
    seconds += time.perf_counter() - started

    scores = join_scores(before["scores"], after["scores"])
    trained_seconds = _training_seconds(trained)
    seconds = round(seconds + before["seconds"] + trained_seconds + after["seconds"], 1)
    samples = _samples(rows, before["texts"], after["texts"])
    page = write_report(
        out,
        title=TITLE,
        scores=scores,
        history=_history(out),
        routing=routing,
        samples=samples,
        settings=recipe.jobs_resolved()[0].model_dump(mode="json"),
        seconds=seconds,
        lead=(
            "One adapter, trained on 240 rows of each task. For every prompt its routers choose three of the seven "
            "linears of each layer, once; the answer's tokens reuse that choice."
        ),
    )
    _show(say, scores, samples)
    minutes = f"{trained_seconds:.0f} s of training, {seconds:.0f} s in all"
    say(f"\n{minutes}. Open [bold]{page}[/]; the adapter is in [bold]{out / 'adapter'}[/].")
    say(f"Try it:  loramux generate --base {resolved} --adapter {out / 'adapter'} --prompt TEXT")
    result: dict[str, Any] = json.loads((out / "report.json").read_text())
    return result


def base_stamp(base: str) -> str:
    """Digest of a base that has been loaded: all of its weight files; a hub id is in the hub's cache by then."""
    from loramux.errors import FetchError
    from loramux.formats.digest import base_digest
    from loramux.persist.base import checkpoint_folder

    folder = checkpoint_folder(base)
    if folder is None:
        raise FetchError(f"{base}: is not in the hub's cache; give the folder of the checkpoint")
    return base_digest(folder)


def _training_seconds(trained: dict[str, Any]) -> float:
    """Of a run that was interrupted, the jobs know the steps of every part, the result the last part only."""
    return max(float(trained["seconds"]), sum(float(job["seconds"]) for job in trained["jobs"]))


def _tasks(recipe: Any) -> list[str]:
    """The tasks the recipe trains on, in its order."""
    paths = [source.path for source in recipe.jobs_resolved()[0].data.train]
    return [path.removeprefix("demo:").split("/")[0] for path in paths]


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    from loramux.eval.generate import generate_model

    made = generate_model(model, tokenizer, prompts, max_tokens=NEW_TOKENS, template="task")
    return [str(entry["text"]) for entry in made]


def _samples(rows: Any, before: Sequence[str], after: Sequence[str]) -> list[dict[str, str]]:
    shown = [(task, row) for task, some in rows.items() for row in some[:SAMPLES]]
    return [
        {"task": task, "prompt": row.prompt, "answer": row.answer, "before": b, "after": a}
        for (task, row), b, a in zip(shown, before, after, strict=True)
    ]


def _history(out: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = json.loads((out / "history.json").read_text())
    return history


def _once(path: Path, stamp: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored result if it was made from the same inputs, else a fresh one, stored."""
    if path.exists():
        stored = json.loads(path.read_text())
        if stored.get("stamp") == stamp:
            return dict(stored)
    started = time.perf_counter()
    made = make()
    result = {"stamp": stamp, "seconds": time.perf_counter() - started, **made}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result, indent=1))
    unfinished.replace(path)
    return result


def _digest(base: str, *files: Path) -> str:
    digest = hashlib.sha256(base.encode())
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def _show(say: Callable[..., None], scores: Sequence[dict[str, Any]], samples: Any) -> None:
    first = [score for score in scores if score["metric"] == "token"]
    table = Table("task", "before", "after", "gain", "rows", title="Accuracy, ranking per token")
    for score in first:
        gain = score["after"] - score["before"]
        table.add_row(
            score["task"],
            f"{score['before']:.3f}",
            f"{score['after']:.3f}",
            f"{gain:+.3f}",
            str(score["rows"]),
        )
    if first:
        mean_before = sum(s["before"] for s in first) / len(first)
        mean_after = sum(s["after"] for s in first) / len(first)
        table.add_section()
        gain = mean_after - mean_before
        table.add_row("mean", f"{mean_before:.3f}", f"{mean_after:.3f}", f"{gain:+.3f}", "")
    Console(file=sys.stdout).print(table)
    for sample in samples:
        say(
            f"[dim]{sample['task']}[/] {sample['prompt']!r}\n  before {sample['before'].strip()!r}\n"
            f"  after  {sample['after'].strip()!r}  (answer {sample['answer']!r})",
            markup=True,
        )
