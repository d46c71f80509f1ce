"""What lies in a folder, as plain records: runs, adapters, merged adapters, comparisons.

Why apart from the drawing: a report shows exactly these numbers, and a folder is somebody else's: what it holds, what
it lacks and what cannot be read is decided here, once. Nothing here runs a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.errors import LoramuxError

SETTING = "setting.json"
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")


class ReportError(LoramuxError):
    """A folder of which no report can be made."""


@dataclass(frozen=True)
class AdapterRecord:
    """A saved adapter. ranks: site -> rank of every expert there; the counts are numbers of parameters."""

    folder: Path
    method: str
    servability: str
    base: str | None
    ranks: Mapping[str, Sequence[int]]
    experts: Sequence[str]
    expert_parameters: int
    router_parameters: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class JobRecord:
    """One job of a run, or a lone adapter: then only `adapter` (or why it cannot be read) is there."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    edits: Sequence[Mapping[str, Any]] = ()
    routing: Sequence[Mapping[str, Any]] = ()
    setting: Mapping[str, Any] = field(default_factory=dict)
    adapter: AdapterRecord | None = None
    problem: str = ""


@dataclass(frozen=True)
class FolderRecord:
    """Everything a folder holds that a report knows to draw. `kind` says what the folder is."""

    folder: Path
    kind: str  # "run", "adapter", "merged adapter", "comparison"
    jobs: Sequence[JobRecord] = ()
    result: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()
    timeline: Sequence[Mapping[str, Any]] = ()  # of jobs that were trained together

    @property
    def base(self) -> str | None:
        """The base that the folder names, if it names one."""
        for job in self.jobs:
            named = job.settings.get("base") or (job.adapter.base if job.adapter else None)
            if isinstance(named, str) and named:
                return named
        return None


def read_folder(folder: str | Path) -> FolderRecord:
    """Read a run, adapter, merged adapter or comparison; raises ReportError if it is none of them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(
            f"{folder} is not a folder; give a run of `loramux train`, a saved adapter or a comparison"
        )
    if (folder / "rows.jsonl").is_file():
        return FolderRecord(
            folder,
            "comparison",
            rows=json_lines(folder / "rows.jsonl"),
            summary=_object(folder / "results.json"),
        )
    if (folder / "run.json").is_file():
        return _run(folder)
    if (folder / "adapter_config.json").is_file() or (folder / "mixture_config.json").is_file():
        provenance = _provenance(folder)
        job = JobRecord(folder.name, **_adapter(folder))
        return FolderRecord(
            folder, "merged adapter" if provenance else "adapter", [job], provenance=provenance
        )
    raise ReportError(
        f"{folder} holds none of run.json (a run of `loramux train`), adapter_config.json or mixture_config.json (a "
        "saved adapter) and rows.jsonl (a comparison); give the folder that holds one of them"
    )


def _run(folder: Path) -> FolderRecord:
    settings = dict(_object(folder / "run.json").get("jobs", {}))
    for row in json_lines(folder / "journal.jsonl"):
        if row.get("what") == "add" and isinstance(row.get("value"), dict):
            settings.setdefault(str(row.get("job")), row["value"])
    result = _object(folder / "result.json")
    results = {
        str(job.get("name")): job for job in result.get("jobs", []) if isinstance(job, Mapping)
    }
    # Jobs that are trained together have folders of their own even where there is one: others may come.
    timeline = json_lines(folder / "timeline.jsonl")
    alone = len(settings) == 1 and not timeline
    jobs = []
    for name, given in settings.items():
        own = folder if alone else folder / _inside(name)
        saved = _adapter(own / "adapter") if (own / "adapter").is_dir() else {}
        jobs.append(
            JobRecord(
                name=str(name),
                settings=given,
                result=results.get(str(name), {}),
                history=_list(own / "history.json"),
                edits=_list(own / "edits.json"),
                routing=json_lines(own / "routing.jsonl"),
                setting=_setting(folder, own, given),
                **saved,
            )
        )
    return FolderRecord(
        folder, "run", jobs, result=result, scores=_scores(folder), timeline=timeline
    )


def _inside(name: str) -> str:
    """A job's name as the name of a folder; the recipe refuses others, a file may have been changed."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise ReportError(
            f"run.json names a job {name!r}, which is no name of a folder; restore the file"
        )
    return name


def _adapter(folder: Path) -> dict[str, Any]:
    """{"adapter": record} or {"problem": why it cannot be read}."""
    try:
        return {"adapter": read_adapter_record(folder)}
    except (LoramuxError, ValueError, OSError) as error:
        return {"problem": " ".join(str(error).split())}


def read_adapter_record(folder: Path) -> AdapterRecord:
    """Sizes and settings of a saved adapter, checked as when it is loaded."""
    from loramux.formats.mixture import is_mixture, read_mixture
    from loramux.formats.peft import read_peft

    if is_mixture(folder):
        mixture = read_mixture(folder, allow_zero=True)
        return AdapterRecord(
            folder,
            mixture.method,
            mixture.servability,
            mixture.base_name or None,
            {p: [_rank(e, p) for e in mixture.experts.values()] for p in mixture.sites},
            tuple(mixture.experts),
            sum(map(_size, mixture.experts.values())) - _repeated(mixture),
            sum(tensor.numel() for tensor in mixture.router.values()),
            mixture.config,
        )
    adapter = read_peft(folder, allow_zero=True)
    method = "dora" if adapter.config.get("use_dora") else "lora"
    named = adapter.config.get("base_model_name_or_path")
    ranks = {path: [entry.rank] for path, entry in adapter.sites.items()}
    config = dict(adapter.config)
    return AdapterRecord(folder, method, "static", named, ranks, (), _size(adapter), 0, config)


def _rank(expert: Any, path: str) -> int:
    entry = expert.sites.get(path)
    return 0 if entry is None else entry.rank


def _size(adapter: Any) -> int:
    return sum(
        entry.a.numel()
        + entry.b.numel()
        + (0 if entry.magnitude is None else entry.magnitude.numel())
        for entry in adapter.sites.values()
    )


def _repeated(mixture: Any) -> int:
    """Numbers of an A that all experts of a site share (HydraLoRA): every expert's folder has them, training once."""
    found = 0
    for path in mixture.sites:
        shared = [e.sites[path].a for e in mixture.experts.values() if path in e.sites]
        first = shared[0]
        if len(shared) > 1 and all(a.shape == first.shape and a.equal(first) for a in shared[1:]):
            found += (len(shared) - 1) * first.numel()
    return found


def _provenance(folder: Path) -> dict[str, Any]:
    """What `loramux compose` noted beside the adapter it made."""
    from loramux.compose.write import PROVENANCE

    return _object(folder / PROVENANCE)


def _setting(run: Path, own: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The setting file a job was trained with: the one its recipe names, or the one its run made."""
    method = given.get("method")
    named = method.get("setting") if isinstance(method, Mapping) else None
    if not isinstance(method, Mapping) or method.get("name") != "fanlora":
        return {}
    paths = [Path(named)] if isinstance(named, str) else [own / SETTING, run / SETTING]
    return next((_object(path) for path in paths if path.is_file()), {})


def _scores(folder: Path) -> list[dict[str, Any]]:
    """The demo measures its base before and its adapter after; both files are in its folder then."""
    from loramux.report.write import join_scores

    before, after = _object(folder / "before.json"), _object(folder / "after.json")
    try:
        return join_scores(before["scores"], after["scores"])
    except (KeyError, TypeError, ValueError):
        return []


def place_of(path: str) -> tuple[int, str]:
    """(layer, path inside it) of a linear or router; layer -1 where the path names none."""
    found = _LAYER.fullmatch(path)
    if found is None:
        number = path.rpartition(".")[2]
        return (int(number), "") if number.isdigit() else (-1, path)
    return int(found[1]), found[2]


def router_names(paths: Sequence[str]) -> list[str]:
    """Short names of routers: the layer, and the place in it where a layer has several."""
    places = [place_of(path) for path in paths]
    if len({layer for layer, _ in places}) == len(places) or not any(name for _, name in places):
        return [str(layer) if layer >= 0 else name for layer, name in places]
    return [
        f"{layer} {name.rpartition('.')[2].removesuffix('_proj')}".strip() for layer, name in places
    ]


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one per line; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _list(path: Path) -> list[dict[str, Any]]:
    found = _json(path)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ReportError(f"{path} is not readable as JSON; restore it or remove it") from None
