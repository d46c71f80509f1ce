"""What needs the base: gates over a sentence and routing by task, through one adapter of the folder.

Why asked for and not always there: it loads a model, and routing depends on what is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.report import plots
from loramux.report.page import Missing, Section, Table, picture
from loramux.report.records import FolderRecord, JobRecord, ReportError
from loramux.report.sentence import observe_sentence, sentence_section
from loramux.report.training import is_fusion

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow
    from loramux.report.routing import Routing

    Rows = Mapping[str, Sequence[TaskRow]]

ROUTED = 64  # rows of each task file
SENTENCE, TASKS = "Gate weights over a sentence", "Routing by task"
NAMED = "(and `--base BASE`, if the folder names none)"


@dataclass(frozen=True)
class Ask:
    """What to show the model. base: default the one the folder names; task: of the sentence; data: task files."""

    base: str | None = None
    sentence: str | None = None
    task: str | None = None
    data: tuple[str, ...] = ()
    rows: int = ROUTED


def observed_sections(record: FolderRecord, ask: Ask) -> list[Section | Missing]:
    """Sections for what was asked, and the way to what was not. Raises ReportError where the base is not known."""
    routed = [job for job in record.jobs if _routes(job)]
    if not routed:
        what = "no adapter of this folder has a router: every token gets the same rows"
        return [Missing(f"{SENTENCE}, {TASKS.lower()}", what)] if ask.sentence or ask.data else []
    parts: list[Section | Missing] = []
    if not ask.sentence:
        parts.append(Missing(SENTENCE, f"give `--sentence TEXT` {NAMED}"))
    if not ask.data:
        parts.append(Missing(TASKS, f"give `--data FILE.jsonl` {NAMED}"))
    if ask.sentence or ask.data:
        if len(routed) > 1:
            others = ", ".join(job.name for job in routed[1:])
            parts.append(
                Missing(f"{SENTENCE} through {others}", "report the adapter folder of that job")
            )
        parts += _observe(record, routed[0], ask)
    return parts


def _routes(job: JobRecord) -> bool:
    adapter = job.adapter
    return adapter is not None and (
        adapter.router_parameters > 0 or adapter.servability != "static"
    )


def _observe(record: FolderRecord, job: JobRecord, ask: Ask) -> list[Section | Missing]:
    from loramux.eval.loading import load_model

    base = ask.base or record.base
    if base is None:
        raise ReportError(
            f"{record.folder} does not say which base it belongs to; name it with --base"
        )
    assert job.adapter is not None
    rows = _rows(ask)  # what is wrong with the data shows before a model is loaded
    loaded = load_model(base, job.adapter.folder)
    through = f", through {job.name}" if len(record.jobs) > 1 else ""
    parts: list[Section | Missing] = []
    if ask.sentence:
        tokens, gates = observe_sentence(loaded.model, loaded.tokenizer, ask.sentence, ask.task)
        names = job.adapter.experts if is_fusion(job.adapter.method) else ()
        parts.append(sentence_section(ask.sentence, tokens, gates, names, f"One sentence{through}"))
    if ask.data:
        parts.append(_task_section(loaded, rows, ask.rows, f"{TASKS}{through}"))
    return parts


def _rows(ask: Ask) -> Rows:
    from loramux.eval.run import read_tasks

    return read_tasks(list(ask.data), ask.rows) if ask.data else {}


def _task_section(loaded: Any, tasks: Rows, rows: int, heading: str) -> Section | Missing:
    from loramux.report.routing import observe

    try:
        routing = observe(loaded.model, loaded.tokenizer, tasks, rows=rows)
    except LoramuxError:
        raise
    except ValueError as error:
        return Missing(TASKS, str(error))
    figures = [
        picture(
            plots.routing_map(routing),
            _routing_text(routing),
            _routing_caption(routing),
            _routing_table(routing),
        )
    ]
    if len(routing.tasks) > 1:
        caption = "The same, minus the mean of all tasks: what a task does differently."
        figures.append(
            picture(
                plots.routing_map(routing, difference=True),
                f"Differences between {len(routing.tasks)} tasks.",
                caption,
            )
        )
    lines = plots.router_lines(routing)
    caption = "How undecided the router is, layer by layer, and how its choices are shared over all layers."
    figures.append(
        picture(lines, "Entropy by layer and use by column, one line or bar per task.", caption)
    )
    return Section(heading, figures=figures, records={"routing_by_task": routing.to_dict()})


def _routing_caption(routing: Routing) -> str:
    return f"Which columns the {routing.unit} of each task are routed to; several routers of a layer are averaged."


def _routing_text(routing: Routing) -> str:
    said = []
    for task in routing.tasks:
        share = routing.share(task)
        top = int(share.argmax())
        said.append(f"{task}: most to {routing.columns[top]}, {100 * share[top]:.0f} per cent")
    return (
        f"Routing maps of {len(said)} tasks over {len(routing.layers)} layers. {'; '.join(said)}."
    )


def _routing_table(routing: Routing) -> Table:
    rows = [
        [task, *(round(100 * float(v), 2) for v in routing.share(task))] for task in routing.tasks
    ]
    return Table(("task", *routing.columns), rows, "Share over all layers, per cent")
