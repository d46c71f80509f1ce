"""What was trained: parameters, steps, time, and the loss on the way there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loramux.report import plots
from loramux.report.charts import Line, Panel, line_panels
from loramux.report.html import duration
from loramux.report.page import Missing, Section, Table, picture, shown
from loramux.report.records import FolderRecord, JobRecord

MOST_CURVES = 8  # in one chart; of more jobs each has its own
MOST_CHARTS = 24
MOST_ROWS = 20_000  # of all histories, in the JSON block
LATE = 10  # history rows that the last training loss is the mean of


def tiles(record: FolderRecord) -> list[tuple[str, str]]:
    """The few numbers a reader looks for first."""
    found: list[tuple[str, str]] = []
    jobs = record.jobs
    if len(jobs) > 1:
        found.append((str(len(jobs)), "jobs over one base"))
    elif jobs:
        found.append((method_of(jobs[0]), "method"))
    sizes = [parameters(job) for job in jobs if job.adapter is not None]
    if sizes:
        found.append(
            (
                large(sum(sizes)),
                "trained parameters" if len(jobs) == 1 else "trained parameters, all jobs",
            )
        )
    if record.result:
        found.append((shown(record.result.get("steps")), "optimizer steps"))
        found.append(
            (duration(float(record.result.get("seconds") or 0.0)), "training, loading included")
        )
        if record.result.get("val_loss") is not None:
            found.append((f"{record.result['val_loss']:.4f}", "best validation loss"))
    return found


def trained_section(record: FolderRecord) -> list[Section | Missing]:
    """The table of jobs, and what it cannot say."""
    rows = [_row(job) for job in record.jobs]
    columns = ("job", "method", "serves", "linears", "experts", "trained", "frozen", "status")
    table = Table(columns, [row[: len(columns)] for row in rows])
    steps = (
        "job",
        "steps",
        "of",
        "tokens",
        "seconds",
        "training loss",
        "validation loss",
        "best step",
    )
    tables = [table]
    if any(job.result or job.history for job in record.jobs):
        tables.append(Table(steps, [_progress(job) for job in record.jobs]))
    records = {"jobs": [_job_record(job) for job in record.jobs]}
    text = (
        "Parameters are counted in the saved adapter: rank rows and routers. Frozen: rows of adapters over which only "
        "gates were trained."
    )
    parts: list[Section | Missing] = [Section("What was trained", text, tables, records=records)]
    for job in record.jobs:
        if job.problem:
            parts.append(Missing(f"The adapter of {job.name}", f"it cannot be read: {job.problem}"))
        elif job.adapter is None:
            parts.append(Missing(f"The adapter of {job.name}", _why_no_adapter(job)))
        if job.result.get("reason") and not record.timeline:  # else the table of jobs has it
            parts.append(Missing(f"The end of {job.name}", str(job.result["reason"])))
    return parts


def _why_no_adapter(job: JobRecord) -> str:
    if job.result.get("status") == "failed":
        return "the job failed before it had one; its reason is in result.json"
    return (
        "the run is not complete; the same `loramux train` command goes on and writes it at the end"
    )


def loss_section(record: FolderRecord) -> Section | Missing:
    """Loss curves; several jobs share one chart."""
    jobs = [
        job for job in record.jobs if any("loss" in row or "val_loss" in row for row in job.history)
    ]
    if not jobs:
        return Missing(
            "Loss curves",
            "the folder holds no history.json; point to the run folder of `loramux train`",
        )
    caption = "Loss over the supervised tokens; pale: single rows, strong: moving average, circles: validation."
    figures = []
    for job in jobs[:1] if len(jobs) == 1 else []:
        figure = plots.loss_curves(job.history)
        figures.append(picture(figure, _loss_text(job), caption, _history_table(job)))
    if len(jobs) > 1:
        drawn = jobs[:MOST_CHARTS]
        if len(jobs) <= MOST_CURVES:
            panels = [_curves(jobs, "loss", "Training"), _curves(jobs, "val_loss", "Validation")]
        else:
            panels = [_own_curves(job) for job in drawn]
        figure = line_panels(panels, across=4 if len(panels) > 2 else 2)
        alt = "; ".join(_loss_text(job) for job in drawn)
        figures.append(
            picture(
                figure,
                alt,
                "Loss of the jobs, as logged (training) and validated.",
                _ends_table(jobs),
            )
        )
    text = (
        f"The first {MOST_CHARTS} of {len(jobs)} jobs are drawn." if len(jobs) > MOST_CHARTS else ""
    )
    thin = math.ceil(sum(len(job.history) for job in jobs) / MOST_ROWS)
    if thin > 1:
        text += f" The JSON block has every {thin}th row and all validations."
    records = {"history": {job.name: _thinned(job.history, thin) for job in jobs}}
    return Section("Training", text, figures=figures, records=records)


def _curves(jobs: Sequence[JobRecord], key: str, title: str) -> Panel:
    lines = []
    for job in jobs:
        points = [
            (row["step"], row[key]) for row in job.history if isinstance(row.get(key), int | float)
        ]
        lines.append(
            Line(job.name, [p[0] for p in points], [p[1] for p in points], marked=key == "val_loss")
        )
    return Panel(title, lines, "optimizer step", "loss (nats per token)", floor=None)


def _own_curves(job: JobRecord) -> Panel:
    """Training and validation of one job."""
    training, validation = (_curves([job], key, job.name).lines[0] for key in ("loss", "val_loss"))
    lines = [replace(training, name="training")]
    if validation.x:
        lines.append(replace(validation, name="validation"))
    return Panel(job.name, lines, "optimizer step", "loss", floor=None)


def _thinned(history: Sequence[Mapping[str, Any]], thin: int) -> list[Mapping[str, Any]]:
    """Every `thin`th row, all validations and the last row."""
    return [
        row
        for i, row in enumerate(history)
        if i % max(thin, 1) == 0 or "val_loss" in row or row is history[-1]
    ]


def _loss_text(job: JobRecord) -> str:
    losses = [row["loss"] for row in job.history if isinstance(row.get("loss"), int | float)]
    valid = [row["val_loss"] for row in job.history if isinstance(row.get("val_loss"), int | float)]
    said = [f"Loss of {job.name} over {job.history[-1]['step']} steps"]
    if losses:
        said.append(f"training from {losses[0]:.3f} to {losses[-1]:.3f}")
    if valid:
        said.append(f"validation from {valid[0]:.3f} to {valid[-1]:.3f}, lowest {min(valid):.3f}")
    return ", ".join(said)


def _history_table(job: JobRecord) -> Table:
    keys = list(dict.fromkeys(key for row in job.history for key in row))
    thin = max(1, len(job.history) // 60)
    rows = _thinned(job.history, thin)
    cut = f"Every {thin}th row and all validations." if thin > 1 else ""
    return Table(keys, [[row.get(key) for key in keys] for row in rows], cut)


def _ends_table(jobs: Sequence[JobRecord]) -> Table:
    return Table(
        ("job", "first loss", "last loss", "lowest validation loss"), [_ends(job) for job in jobs]
    )


def _ends(job: JobRecord) -> list[Any]:
    losses = [row["loss"] for row in job.history if isinstance(row.get("loss"), int | float)]
    valid = [row["val_loss"] for row in job.history if isinstance(row.get("val_loss"), int | float)]
    late = losses[-LATE:]
    return [
        job.name,
        losses[0] if losses else None,
        sum(late) / len(late) if late else None,
        min(valid, default=None),
    ]


def _row(job: JobRecord) -> list[Any]:
    adapter = job.adapter
    status = job.result.get("status") or ("saved" if adapter else "not finished")
    if adapter is None:
        return [job.name, method_of(job), None, None, None, None, None, status]
    most = max((sum(rank > 0 for rank in ranks) for ranks in adapter.ranks.values()), default=0)
    frozen = adapter.expert_parameters if is_fusion(adapter.method) else 0
    return [
        job.name,
        adapter.method,
        adapter.servability,
        len(adapter.ranks),
        most,
        parameters(job),
        frozen,
        status,
    ]


def _progress(job: JobRecord) -> list[Any]:
    result = job.result
    last = job.history[-1] if job.history else {}
    return [
        job.name,
        result.get("steps", last.get("step")),
        result.get("num_steps"),
        result.get("tokens", last.get("tokens")),
        result.get("seconds"),
        result.get("train_loss", _ends(job)[2]),
        result.get("val_loss", _ends(job)[3]),
        result.get("best_step"),
    ]


def _job_record(job: JobRecord) -> dict[str, Any]:
    """What the table shows, for the JSON block."""
    adapter = job.adapter
    sizes: dict[str, Any] = {}
    if adapter is not None:
        sizes = {
            "servability": adapter.servability,
            "expert_parameters": adapter.expert_parameters,
            "router_parameters": adapter.router_parameters,
            "trained_parameters": parameters(job),
            "ranks": adapter.ranks,
            "experts": adapter.experts,
        }
    return {"name": job.name, "method": method_of(job), "result": job.result, **sizes}


def parameters(job: JobRecord) -> int:
    """Numbers that training changed, as far as the saved adapter holds them."""
    adapter = job.adapter
    if adapter is None:
        return 0
    own = 0 if is_fusion(adapter.method) else adapter.expert_parameters
    return own + adapter.router_parameters


def is_fusion(method: str) -> bool:
    """Whether the method trains gates over adapters that stay as they are."""
    from loramux.methods import load_method

    try:
        return load_method(method).needs_adapters
    except ValueError:
        return False


def method_of(job: JobRecord) -> str:
    """The method's name: as the recipe says, or as the adapter does."""
    given = job.settings.get("method")
    if isinstance(given, Mapping) and given.get("name"):
        return str(given["name"])
    return job.adapter.method if job.adapter is not None else "unknown"


def large(number: int) -> str:
    """`1.24 M` for people; tables have the exact number."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
