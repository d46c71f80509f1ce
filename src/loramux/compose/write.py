"""Puts a merged or lowered adapter on disk: a plain PEFT folder, our note of its base, and where it came from.

The provenance is a JSON of its own, so that the PEFT files hold nothing PEFT does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loramux.compose.parts import Merged
from loramux.compose.sources import Source, fp32, one_value
from loramux.errors import LoramuxError
from loramux.formats.files import check_place, replace_folder
from loramux.formats.jsonio import write_json
from loramux.formats.mixture import is_mixture
from loramux.formats.peft import CONFIG_NAME, write_peft
from loramux.formats.scaling import peft_config, uneven
from loramux.formats.tensors import AdapterTensors, SiteTensors, zero_sites
from loramux.persist.base import RECORD, base_record

SELECTION = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
PROVENANCE = "compose.json"


def check_out(
    out: str | os.PathLike[str], force: bool, inputs: Sequence[str | os.PathLike[str]] = ()
) -> Path:
    """The folder to write to; a full one only with `force`, where it holds an adapter that is none of the inputs.

    Raises before any work where nothing can be written there.
    """
    folder = Path(out)
    for given in inputs:
        read = Path(given).resolve()
        if folder.resolve() in (read, *read.parents):
            what = "is" if folder.resolve() == read else "holds"
            raise LoramuxError(
                f"--out {folder} {what} the adapter {given} that is read; choose another folder"
            )
    check_place(folder)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not force:
        raise LoramuxError(
            f"{folder} is not empty; choose another --out, or replace it with --force"
        )
    if folder.is_symlink() or not ((folder / CONFIG_NAME).is_file() or is_mixture(folder)):
        raise LoramuxError(
            f"{folder} holds no adapter, so --force does not replace it; choose another --out"
        )
    return folder


def merged_tensors(sources: Sequence[Source], merged: Mapping[str, Merged]) -> AdapterTensors:
    """The result as an adapter: fp32, scale 1 everywhere (lora_alpha = r, no rsLoRA), ranks as they came out."""
    sites = {path: SiteTensors(fp32(m.a), fp32(m.b)) for path, m in merged.items()}
    configs = [source.tensors.config for source in sources]
    tensors = plain_adapter(
        sites,
        base_name=one_value([config.get("base_model_name_or_path") for config in configs]),
        task_type=one_value([config.get("task_type") for config in configs], "CAUSAL_LM"),
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        selection=_selection(sources, list(sites)),
    )
    if len(zero_sites(tensors)) == len(sites):
        raise LoramuxError(
            "the merged adapter changes nothing: its rows are zero everywhere; the bare base does the same. "
            "Choose other weights or another lambda"
        )
    return tensors


def plain_adapter(
    sites: Mapping[str, SiteTensors],
    *,
    base_name: str | None,
    task_type: str | None = "CAUSAL_LM",
    fan_in_fan_out: bool = False,
    use_dora: bool = False,
    selection: Mapping[str, Any] | None = None,
) -> AdapterTensors:
    """A PEFT adapter of scale 1. `selection`: the fields that say which linears; without it they are named in full."""
    ranks = {path: site.rank for path, site in sites.items()}
    r, alpha, rank_pattern, alpha_pattern = uneven(ranks, {p: float(k) for p, k in ranks.items()})
    config = peft_config(
        r,
        alpha,
        target_modules=sorted(sites),
        fan_in_fan_out=fan_in_fan_out,
        use_dora=use_dora,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        base_model_name_or_path=base_name,
        task_type=task_type,
    )
    return AdapterTensors.build({**config, **(selection or {})}, sites)


def _selection(sources: Sequence[Source], paths: Sequence[str]) -> dict[str, Any]:
    """What all inputs say about their targets, if it covers just these linears; else nothing."""
    chosen = [
        {key: s.tensors.config[key] for key in SELECTION if s.tensors.config.get(key) is not None}
        for s in sources
    ]
    same_sites = all(set(source.tensors.sites) == set(paths) for source in sources)
    found: dict[str, Any] = one_value(chosen, {}) if same_sites else {}
    return found


def joint_record(sources: Sequence[Source], paths: Sequence[str]) -> dict[str, Any] | None:
    """Our note of the base, from what the inputs' folders say; None where they say nothing."""
    marks: dict[str, str] = {}
    for source in sources:
        noted = source.record.get("base_sites")
        marks.update(noted if isinstance(noted, dict) else {})
    whole = (s.record.get("base_sample") for s in sources if set(s.tensors.sites) == set(paths))
    sample = next((digest for digest in whole if isinstance(digest, str)), None)
    if sample is None and not marks:
        return None
    name = next((str(s.record["base_name"]) for s in sources if s.record.get("base_name")), "")
    return base_record(name, sample, {path: marks[path] for path in paths if path in marks})


def write_folder(
    folder: Path,
    tensors: AdapterTensors,
    record: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
    name: str = PROVENANCE,
) -> None:
    """All files or none; what was there before is replaced in one step."""

    def fill(part: Path) -> None:
        write_peft(part, tensors)
        if record is not None:
            write_json(part / RECORD, dict(record))
        write_json(part / name, dict(provenance))

    replace(folder, fill)


def replace(folder: Path, fill: Callable[[Path], None]) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(folder, fill)
    except OSError as error:
        raise LoramuxError(f"--out {folder} cannot be written: {error}") from None


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    from loramux import __version__

    found = {"loramux": __version__}
    for package in ("torch", "peft", "scikit-learn", "nevergrad"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
