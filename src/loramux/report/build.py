"""`make_report`: one folder in, one page out. What it holds is drawn; what it lacks is named with the way to it.

Why the model is optional: everything a run wrote down is drawn without it, in seconds and anywhere. A sentence or task
rows need the base, because routing depends on what is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loramux.formats.files import check_place
from loramux.report import plots
from loramux.report.comparison import comparison_sections
from loramux.report.experts import expert_section
from loramux.report.importance import importance_section
from loramux.report.merges import merge_section
from loramux.report.observed import ROUTED, Ask, observed_sections
from loramux.report.page import Missing, Report, Section, Table, picture
from loramux.report.ranks import rank_section
from loramux.report.records import FolderRecord, JobRecord, ReportError, read_folder
from loramux.report.schedule import result_section, schedule_section
from loramux.report.training import is_fusion, loss_section, tiles, trained_section

log = logging.getLogger(__name__)
MOST_JOBS = 6  # drawn in full; of more, tables and curves only
NAME = "run_report.html"


def make_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    base: str | None = None,
    sentence: str | None = None,
    task: str | None = None,
    data: Sequence[str] = (),
    rows: int = ROUTED,
) -> dict[str, Any]:
    """Write the page (default: `run_report.html` in the folder); returns {"report", "bytes", "sections", "missing"}.

    base: folder, fetch name or hub id; by default the one the folder names. It is loaded only for `sentence` and
    `data` (task files); `task` tells routers that go by it what the sentence is. Raises LoramuxError (a ValueError)
    before anything is written.
    """
    record = read_folder(folder)
    path = Path(out) if out is not None else record.folder / NAME
    if path.is_dir():
        raise ReportError(f"{path} is a folder; name the HTML file to write, such as {path / NAME}")
    if not path.exists():
        check_place(path)
    ask = Ask(base, sentence, task, tuple(data), rows)
    _check_asked(record, ask)
    report = build_report(record, ask)
    text = report.html()
    _write(path, text)
    return {
        "report": str(path),
        "kind": record.kind,
        "bytes": len(text.encode()),
        "sections": [section.title for section in report.sections],
        "missing": [{"what": part.what, "how": part.how} for part in report.missing],
    }


def _check_asked(record: FolderRecord, ask: Ask) -> None:
    """A comparison holds many adapters: none of them is shown a sentence or rows."""
    asked = {"base": ask.base, "sentence": ask.sentence, "task": ask.task, "data": ask.data}
    unused = [name for name, value in asked.items() if value]
    if record.kind == "comparison" and unused:
        raise ReportError(
            f"{record.folder} is a comparison, whose page takes no {', '.join(unused)}; leave it out, or report the "
            "folder of one of its adapters"
        )


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--out {path} cannot be written ({error.strerror})") from None


def build_report(record: FolderRecord, ask: Ask | None = None) -> Report:
    """The page in parts, not written yet."""
    named = record.folder.resolve().name
    report = Report(f"Report of the {record.kind} {named}", settings=_settings(record))
    report.records |= {"folder": named, "kind": record.kind}
    if record.kind == "comparison":
        _add(report, "Comparison", comparison_sections, record.rows, record.summary)
        return report
    report.tiles = tiles(record)
    _add(report, "Jobs", result_section, record)
    _add(report, "What was trained", trained_section, record)
    _add(report, "Scores on tasks", _score_section, record)
    _add(report, "Merge", merge_section, record.provenance)
    if record.kind != "merged adapter":
        _add(report, "Loss curves", loss_section, record)
        _add(report, "Schedule", schedule_section, record)
    for job in record.jobs[:MOST_JOBS]:
        _add_job(report, job, several=len(record.jobs) > 1)
    if len(record.jobs) > MOST_JOBS:
        how = f"the first {MOST_JOBS} of {len(record.jobs)} jobs are drawn in full; report a job's adapter folder"
        report.add(Missing("Ranks and experts of the other jobs", how))
    for part in observed_sections(record, ask or Ask()):
        report.add(part)
    return report


def _add(report: Report, what: str, section: Callable[..., Any], *given: Any) -> None:
    """Add what `section` makes of records; those that are not as they were written cost their section only."""
    try:
        made = section(*given)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        log.debug("%s", what, exc_info=True)
        reason = f"the folder's records for it are not as loramux writes them ({error!r:.200})"
        made = Missing(what, f"{reason}; restore the file, or run anew")
    for part in made if isinstance(made, list) else [made]:
        report.add(part)


def _add_job(report: Report, job: JobRecord, several: bool) -> None:
    of = f" of {job.name}" if several else ""
    fusion = job.adapter is not None and is_fusion(job.adapter.method)
    # Gates over frozen adapters: their ranks are whatever those have.
    if job.edits or not fusion:
        _add(report, f"Ranks{of}", rank_section, job, f"Ranks{of}")
    _add(report, f"Importance{of}", importance_section, job, f"Importance{of}")
    _add(report, f"Experts{of}", expert_section, job, f"Experts{of}")


def _settings(record: FolderRecord) -> dict[str, Any]:
    if record.kind == "run":
        return {job.name: dict(job.settings) for job in record.jobs}
    return {job.name: dict(job.adapter.config) for job in record.jobs if job.adapter is not None}


def _score_section(record: FolderRecord) -> Section | Missing | None:
    """Scores before and after, where the folder has both (the demo measures them)."""
    if record.kind != "run":
        return None
    if not record.scores:
        how = "a run measures its loss only; `loramux eval --base BASE --adapter DIR --data FILE.jsonl` measures"
        return Missing("Scores on tasks", how)
    rows = [[s["task"], s["metric"], s["before"], s["after"], s["rows"]] for s in record.scores]
    chart = plots.score_chart(record.scores)
    alt = "; ".join(
        f"{s['task']} {s['before']:.3g} to {s['after']:.3g}" for s in plots.headline(record.scores)
    )
    caption = "First metric of each task before and after training; lines are standard errors."
    table = Table(("task", "metric", "before", "after", "rows"), rows)
    figures = [picture(chart, f"Scores before and after: {alt}.", caption, table)]
    return Section(
        "Scores", figures=figures, records={"scores": [dict(score) for score in record.scores]}
    )


__all__ = ["Ask", "build_report", "make_report"]
