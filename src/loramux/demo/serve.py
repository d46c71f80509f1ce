"""The server from end to end: two tenants, a real `loramux serve`, the official client, every answer checked.

What is trained is kept, so an interrupted run goes on where it stopped and a second one goes straight to the server.
Adapters come from `loramux tenants` (demo/tenants.py), which has the same folder, and one more of serve.yaml.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from loramux.demo import serve_home as home
from loramux.demo.serve_steps import ASKING, FRESH, Outcome, Scene, Step
from loramux.demo.serve_talk import check_installed, talking
from loramux.errors import LoramuxError

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow
    from loramux.recipe import Recipe

TASKS = ("clickbait", "snips", "banking")
MIXTURE = "milora"  # asked for by name: without samples `auto` does not consider it
SAMPLES = 20
REPORT = "report.json"


def main(out: Path, base: str, adapters: Path) -> dict[str, Any]:
    """Run the demo into `out`, with the trained adapters of `adapters`; returns what report.json holds.

    `failed` names the steps that were not right; nothing is raised for them.
    """
    check_installed()
    from loramux import fetch

    say = partial(Console(stderr=True, highlight=False).print, soft_wrap=True)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    resolved = str(Path(fetch.resolve_base(base)).resolve())
    say("[bold]1/3[/] Adapters: LoRAs of four tasks and a MiLoRA")
    trained = train(resolved, out, adapters.resolve())
    training_s = time.perf_counter() - began
    began = time.perf_counter()
    with ExitStack() as opened:
        scene, last_steps = _open(opened, out, resolved, trained, say)
        start_s = time.perf_counter() - began
        say("[bold]3/3[/] Questions")
        began = time.perf_counter()
        steps = run_steps((*ASKING, *last_steps), scene, say)
    result = {
        "base": resolved,
        "steps": steps,
        "failed": [step["name"] for step in steps if not step["is_right"]],
        "seconds": {
            "adapters": round(training_s, 1),
            "start": round(start_s, 1),
            "steps": round(time.perf_counter() - began, 1),
        },
    }
    (out / REPORT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def train(base: str, out: Path, adapters: Path) -> dict[str, Path]:
    """Train what is not there yet; the folder of each adapter by its name."""
    from loramux.demo import tenants

    trained, _ = tenants.train(_recipe("tenants.yaml", base), adapters)
    fresh, _ = tenants.train(_recipe("serve.yaml", base), out)
    return {name: (trained | fresh)[name] for name in (*TASKS, MIXTURE, FRESH)}


def run_steps(
    steps: Sequence[tuple[str, Step]], scene: Scene, say: Callable[..., None]
) -> list[dict[str, Any]]:
    """All of them, also after one that failed; what is said of each is said at once."""
    import httpx
    from openai import OpenAIError

    told = []
    for number, (name, step) in enumerate(steps, 1):
        began = time.perf_counter()
        try:
            outcome = step(scene)
        except (OpenAIError, httpx.HTTPError, LoramuxError, LookupError, TypeError) as error:
            # A reply of another shape than promised is the step's failure, not the end of the demo.
            outcome = Outcome("", f"{type(error).__name__}: {error}", False)
        mark = "[green]right[/]" if outcome.is_right else "[red]WRONG[/]"
        say(f"[bold]{number:>2}. {name}[/] {mark}")
        say(f"    asked     {escape(outcome.asked)}\n    answered  {escape(outcome.answered)}")
        seconds = round(time.perf_counter() - began, 2)
        told.append({"name": name, **vars(outcome), "seconds": seconds})
    return told


def _open(
    opened: ExitStack, out: Path, base: str, trained: dict[str, Path], say: Callable[..., None]
) -> tuple[Scene, list[tuple[str, Step]]]:
    """Registry, keys, server and clients, open until `opened` ends; and the steps that need more than a client."""
    from loramux.demo import serve_proof as proof
    from loramux.registry import Registry
    from loramux.tenancy import Tenancy

    rows = {task: _rows(task, "test") for task in (*TASKS, FRESH)}
    samples = {task: [row.prompt for row in _rows(task, "train")[:SAMPLES]] for task in rows}
    config = home.write_config(out, base)
    registry = opened.enter_context(Registry.open(out / "registry"))
    tenancy = opened.enter_context(Tenancy.open(registry.database))
    home.forget(registry, FRESH)
    given = {name: (trained[name], samples.get(name)) for name in (*TASKS, MIXTURE)}
    refs = home.publish(registry, base, given)
    keys = opened.enter_context(home.keys(tenancy))
    say(f"[bold]2/3[/] `loramux serve {config}` over {', '.join(refs.values())}")
    url = opened.enter_context(home.serving(config))
    say(f"      at {url}, log in {out / home.LOG}")
    secrets = {tenant: secret for tenant, (_, secret) in keys.items()}
    talk = opened.enter_context(talking(url, secrets, Path(base).name))
    scene = Scene(talk, rows, samples, refs, trained[FRESH])
    return scene, [
        ("receipts", partial(proof.receipts, registry=registry)),
        ("a replay", partial(proof.replay, registry=registry, base=base)),
        ("a revoked key", partial(proof.a_revoked_key, tenancy=tenancy, key_id=keys[home.OWNER][0])),
    ]  # fmt: skip


def _recipe(name: str, base: str) -> Recipe:
    from loramux.recipe import load_recipe

    return load_recipe(Path(__file__).parent / name, [f"base={json.dumps(base)}"])


def _rows(task: str, split: str) -> list[TaskRow]:
    from loramux.data.tasks import read_task

    return read_task(Path(__file__).parent / "data" / task / f"{split}.jsonl")
