"""`loramux bench`: speed against the references, with an interval and a control."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import STDOUT, JsonOption, emit, only_json, table
from loramux.errors import LoramuxError


class What(StrEnum):
    """What can be timed."""

    decode = "decode"
    prefill = "prefill"
    mixed = "mixed"
    load = "load"
    residency = "residency"
    serve = "serve"
    train = "train"
    methods = "methods"
    score = "score"
    schedule = "schedule"


class Part(StrEnum):
    """Which half of a measurement that has two."""

    models = "models"
    engine = "engine"
    jobs = "jobs"


COLUMNS = ("what", "batch", "variant", "reference", "ms", "ratio", "95 %", "target", "verdict")


def bench(
    what: Annotated[What, typer.Argument(help="Which speed.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rounds on a small model: does it run?")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkpoint instead of random weights.")
    ] = None,
    part: Annotated[
        Part | None,
        typer.Option(
            "--part",
            help="Only attached models, only the engine (decode, load), or only jobs (train).",
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=3, metavar="N", help="At most so many paired rounds.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Of a joint run (schedule); else shipped ones."
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Time variants against references; ratios are medians of paired rounds.

    decode: steps of one token, of attached models and of the engine. prefill: whole prompts. mixed: all kinds of
    adapters in one batch. load: adapters from disk and from memory. residency: with up to 1,000 adapters at hand.
    serve: traffic, with latencies. train: training steps and memory, and jobs trained together. methods: training
    steps of every mixture against a LoRA of equal active rank. score: ablation scores of ranks against the plain
    double loop. schedule: schedulers of joint training, played on traces of real runs; rounds are seeds.
    What is not installed is named and left out.

    With --json FILE a picture, FILE with the ending .png, is written beside it.

    Example: loramux bench decode --quick --json bench.json
    """
    with only_json(json):
        from loramux.bench.run import bench as run

        half = None if part is None else part.value
        if what is What.schedule:
            from loramux.bench.schedule import bench_schedule

            result = bench_schedule(trace, quick, rounds)
        else:
            if trace is not None:
                raise LoramuxError("--trace is for loramux bench schedule; leave it out")
            result = run(what.value, quick, base=base, part=half, rounds=rounds)
    emit(result, json, _show)
    if json is not None and json != STDOUT:
        from loramux.bench.plot import save_chart

        save_chart(result, Path(json).with_suffix(".png"))


def _show(result: dict[str, Any]) -> None:
    if result.get("bench") == "schedule":
        _show_schedule(result["details"])
        return
    rows = [
        [
            *(row.get(key) for key in ("what", "batch", "variant", "reference", "ms", "ratio")),
            f"{row['low']:.3f} - {row['high']:.3f}",
            _target(row),
            row.get("verdict"),
        ]
        for row in result["rows"]
    ]
    table("time(variant) / time(reference)", COLUMNS, rows)
    for name, why in result.get("absent", {}).items():
        print(f"not measured: {name}: {why}")


def _show_schedule(details: dict[str, Any]) -> None:
    """Medians over the seeds with their 95 % intervals, and what the times rest on."""
    rows = [
        [name, *(f"{each[0]:.3g} ({each[1]:.3g} - {each[2]:.3g})" for each in found.values())]
        for name, found in details["figures"].items()
    ]
    columns = ("scheduler", "makespan s", "turnaround s", "95 % s", "high priority s", "padding")
    table("Jobs by scheduler", (*columns, "tokens/s"), rows)
    tokens = details["round_tokens"]
    print("tokens of a round: " + ", ".join(f"{name} {count}" for name, count in tokens.items()))
    for one in details["predicted"]:
        print(
            f"{one['trace']}: {one['predicted_s']} s predicted, {one['measured_s']} s measured "
            f"({one['error']:+.1%}), costs fitted to {', '.join(one['fitted_to'])}"
        )


def _target(row: dict[str, Any]) -> str:
    """Most targets are ratios; a load has one in milliseconds."""
    if row.get("target_ms") is not None:
        return f"{row['target_ms']:g} ms"
    return "-" if row.get("target") is None else f"{row['target']:.3f}"
