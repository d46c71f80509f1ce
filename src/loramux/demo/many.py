"""Eight adapters on eight tasks at once, each against its solo run: accuracy, throughput and memory.

    python -m loramux.demo.many --out runs/eight         # some 25 minutes on two cores

Every part (the base's scores, all jobs together, each job alone, each job in PEFT; the last three per seed) runs in a
process of its own, so that its peak memory is its own, and leaves a file: what is there is not done again. Same rows,
batches, steps and seeds throughout. Writes many.json and many.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loramux.demo.many_table import Results, page, summary
from loramux.errors import LoramuxError

TASKS = (
    "banking",
    "bbh_disambiguation_qa",
    "bbh_hyperbaton",
    "bbh_object_counting",
    "clickbait",
    "clinc",
    "e2e",
    "snips",
)
# PEFT's adapters are trained once, with the first seed, for their time and memory; they are not scored.
JOINT, SOLO, PEFT, BASE = "joint", "solo", "peft", "base"


class ManyError(LoramuxError):
    """A part of the run did not come to its end."""


@dataclass(frozen=True)
class Setting:
    """What is trained and measured. rows: of one step; test_rows, generated_rows: scored by ranking, by generation."""

    base: str
    tasks: tuple[str, ...] = TASKS
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 50
    rows: int = 4
    test_rows: int = 100
    generated_rows: int = 32
    rank: int = 8
    learning_rate: float = 1e-3
    sequence_len: int = 256


@dataclass(frozen=True)
class Part:
    """One process: what it trains (kind, seed, tasks), and what it leaves (`name`.json)."""

    kind: str
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        who = f"-{self.tasks[0]}" if self.kind in (SOLO, PEFT) else ""
        return self.kind if self.kind == BASE else f"{self.kind}-{self.seed}{who}"


def parts(setting: Setting) -> Iterator[Part]:
    """In the order in which they run."""
    yield Part(BASE, 0, setting.tasks)
    for seed in setting.seeds:
        yield Part(JOINT, seed, setting.tasks)
        for task in setting.tasks:
            yield Part(SOLO, seed, (task,))
    for task in setting.tasks:
        yield Part(PEFT, setting.seeds[0], (task,))


def main(out: Path, setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not there yet; returns what many.json holds."""
    from loramux.fetch import resolve_base
    from loramux.formats.jsonio import write_json

    setting = replace(setting, base=str(resolve_base(setting.base, progress=say)))
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Part, dict[str, Any]] = {}
    todo = list(parts(setting))
    for number, part in enumerate(todo, 1):
        path = folder / f"{part.name}.json"
        stamp = _stamp(setting, part)
        result = _stored(path, stamp)
        if result is None:
            start = time.perf_counter()
            # Of a part that was interrupted: its times would be half.
            shutil.rmtree(out / "runs" / part.name, ignore_errors=True)
            result = {"stamp": stamp, **_in_a_process(out / "runs", setting, part)}
            write_json(path, result)
            say(f"[{number}/{len(todo)}] {part.name}: {time.perf_counter() - start:.0f} s")
        else:
            say(f"[{number}/{len(todo)}] {part.name}: is there")
        found[part] = result
    results = _gathered(setting, found)
    report = summary(results)
    report["setting"] = asdict(setting)
    write_json(out / "many.json", report)
    (out / "many.md").write_text(page(results), encoding="utf-8")
    return report


def _gathered(setting: Setting, found: dict[Part, dict[str, Any]]) -> Results:
    def of(kind: str) -> dict[int, list[dict[str, Any]]]:
        return {
            seed: [
                result for part, result in found.items() if (part.kind, part.seed) == (kind, seed)
            ]
            for seed in setting.seeds
        }

    return Results(
        tasks=setting.tasks,
        seeds=setting.seeds,
        described=(
            f"LoRA of rank {setting.rank} on all linears, {setting.steps} steps of {setting.rows} rows per task, "
            f"learning rate {setting.learning_rate:g}"
        ),
        base=next(result for part, result in found.items() if part.kind == BASE),
        joint={seed: some[0] for seed, some in of(JOINT).items()},
        solo=of(SOLO),
        peft=of(PEFT)[setting.seeds[0]],
    )


def _stamp(setting: Setting, part: Part) -> str:
    """What a part's result depends on; parts of another setting are made again."""
    given = {**asdict(setting), "seeds": part.seed, "tasks": part.tasks}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _stored(path: Path, stamp: str) -> dict[str, Any] | None:
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return stored if stored.get("stamp") == stamp else None


def _in_a_process(runs: Path, setting: Setting, part: Part) -> dict[str, Any]:
    folder = runs / part.name
    work = {"setting": asdict(setting), "part": asdict(part), "folder": str(folder)}
    done = subprocess.run(
        [sys.executable, "-m", "loramux.demo.many_part", json.dumps(work)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        told = done.stderr.strip()[-2000:]
        raise ManyError(f"{part.name} failed; the same command goes on with it. It said:\n{told}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def setting_of(arguments: list[str]) -> tuple[Path, Setting]:
    """(folder, setting) from a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loramux.demo.many", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/eight"), help="folder of the results"
    )
    parser.add_argument("--base", default="smollm2-135m", help="folder, fetch name or hub id")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(Setting.seeds))
    for name in ("steps", "rows", "test_rows", "generated_rows", "rank"):
        default = getattr(Setting, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=Setting.learning_rate)
    given = vars(parser.parse_args(arguments))
    out: Path = given.pop("out")
    given |= {"tasks": tuple(given["tasks"]), "seeds": tuple(dict.fromkeys(given["seeds"]))}
    return out, Setting(**given)


def run(arguments: list[str]) -> int:
    """The command line."""
    out, setting = setting_of(arguments)

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    try:
        main(out, setting, say)
    except LoramuxError as error:
        say(f"Error: {error}")
        return 1
    sys.stdout.write((out / "many.md").read_text(encoding="utf-8"))
    say(f"Written to {out / 'many.md'} and {out / 'many.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
