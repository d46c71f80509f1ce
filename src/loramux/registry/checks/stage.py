"""From members to files we named ourselves: names checked, sizes capped, bytes copied and hashed.

Why a copy: what is checked must be what is stored, whatever happens to the source meanwhile. Why an allow-list: a
member's name never becomes part of a path unless it is one of the few an adapter has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loramux.formats.errors import listed
from loramux.formats.mixture_header import EXPERT_NAME, EXPERTS_NAME
from loramux.formats.peft import CONFIG_NAME, MIXTURE_NAME, WEIGHTS_NAME
from loramux.registry.checks.errors import UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.sources import Member, Source
from loramux.registry.names import shown

ROUTER_NAME = "router.safetensors"
RECORD_NAME = "loramux.json"  # which base a plain adapter belongs to, where loramux saved it
MAX_NAME = 255

_PART = re.compile(r"[A-Za-z0-9._ +=@,()-]{1,200}")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
# Beside an adapter in many folders, of no use to anybody who loads it: left out, and said so.
_IGNORED = re.compile(
    r"(?i)(README|LICENSE|LICENCE|NOTICE|COPYING|MODEL_CARD)(\.(md|txt|rst))?"
    r"|\.gitattributes|\.gitignore|\.DS_Store|\._.*|Thumbs\.db"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|generation_config|trainer_state|"
    r"train_results|all_results|eval_results|training_args|config|result|results)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|recipe\.(ya?ml|json)|.*\.log"
)


@dataclass(frozen=True)
class StagedFile:
    """One file of a checked upload: its place in the adapter's folder, and the copy that was checked."""

    path: str
    sha256: str
    num_bytes: int
    staged: Path


@dataclass(frozen=True)
class Staged:
    """The files of one adapter, in order of their paths, laid out in `folder`."""

    folder: Path
    files: tuple[StagedFile, ...]
    ignored: tuple[str, ...]

    @property
    def is_mixture(self) -> bool:
        return any(file.path == MIXTURE_NAME for file in self.files)


def stage(source: Source, folder: Path, limits: UploadLimits) -> Staged:
    """Copy the files of an adapter to `folder`, which is empty; everything else is refused or left out."""
    with source.members(limits, folder) as members:
        chosen, ignored = choose(members)
        left = limits.max_bytes
        files = []
        for path in sorted(chosen):
            most = min(left, limits.max_json_bytes) if path.endswith(".json") else left
            file = _copy(chosen[path], path, folder, most)
            left -= file.num_bytes
            files.append(file)
    return Staged(folder, tuple(files), tuple(ignored))


def choose(members: Iterable[Member]) -> tuple[dict[str, Member], list[str]]:
    """(the adapter's files by their place, names left out); one folder around everything is taken off."""
    named = _by_name(members)
    paths = _without_top(list(named))
    ignored = sorted(path for path in paths if _is_ignored(path))
    kept = {path: named[name] for path, name in paths.items() if not _is_ignored(path)}
    _check_layout(list(kept))
    return kept, ignored


def member_path(name: object) -> str:
    """A member's name as a plain relative path; refuses all that a file system could read as something else."""
    if isinstance(name, str) and len(name) <= MAX_NAME:
        parts = name.removeprefix("./").split("/")
        if all(_PART.fullmatch(part) and part.strip(". ") for part in parts):
            return "/".join(parts)
    raise UploadError(
        f"{shown(name)} is no member name that is allowed: a relative path of ASCII letters, digits and ._ +=@,()- "
        f"with '/' between its parts, none of them '.' or '..', at most {MAX_NAME} characters. Pack the adapter's "
        "folder again",
        code="archive_name",
    )


def _by_name(members: Iterable[Member]) -> dict[str, Member]:
    named: dict[str, Member] = {}
    seen: set[str] = set()
    for member in members:
        path = member_path(member.name)
        if path.lower() in seen:
            raise UploadError(
                f"{shown(path)} is there twice, or in two spellings that differ by case; which one counts depends on "
                "who reads it. Keep one",
                code="duplicate_member",
            )
        seen.add(path.lower())
        named[path] = member
    return named


def _without_top(names: list[str]) -> dict[str, str]:
    """Place in the adapter -> name as given."""
    own = [name for name in names if not name.startswith("__MACOSX/")]
    tops = {name.partition("/")[0] for name in own}
    is_wrapped = len(tops) == 1 and all("/" in name for name in own) and tops != {EXPERTS_NAME}
    cut = len(tops.pop()) + 1 if is_wrapped else 0
    return {name[cut:]: name for name in own}


def _is_ignored(path: str) -> bool:
    return _IGNORED.fullmatch(path.rpartition("/")[2]) is not None and "/" not in path


def _check_layout(paths: list[str]) -> None:
    pickled = [path for path in paths if path.lower().endswith(_PICKLED)]
    if pickled:
        raise UploadError(
            f"{listed(pickled)} can run code when opened; only safetensors and JSON are taken. Leave such files out; "
            f"weights: save them as {WEIGHTS_NAME} (PEFT: save_pretrained(..., safe_serialization=True))",
            code="pickle",
        )
    needed, optional = _layout(paths)
    missing = sorted(needed - set(paths))
    if missing:
        raise UploadError(
            f"the upload lacks {listed(missing)}; send the files that save_pretrained or loramux wrote: {CONFIG_NAME} "
            f"and {WEIGHTS_NAME}, or {MIXTURE_NAME}, {ROUTER_NAME} and {EXPERTS_NAME}/",
            code="missing_file",
        )
    extra = [path for path in paths if path not in needed | optional]
    if extra:
        raise UploadError(
            f"{listed(extra)} is no part of an adapter; leave it out", code="extra_file"
        )


def _layout(paths: list[str]) -> tuple[set[str], frozenset[str]]:
    """(files that must be there, files that may)."""
    if MIXTURE_NAME not in paths:
        return {CONFIG_NAME, WEIGHTS_NAME}, frozenset({RECORD_NAME})
    parts = [path.split("/") for path in paths]
    names = {p[1] for p in parts if len(p) == 3 and p[0] == EXPERTS_NAME}
    experts = [f"{EXPERTS_NAME}/{name}" for name in names if EXPERT_NAME.fullmatch(name)]
    inside = {f"{expert}/{file}" for expert in experts for file in (CONFIG_NAME, WEIGHTS_NAME)}
    return {MIXTURE_NAME, ROUTER_NAME, *inside}, frozenset()


def _copy(member: Member, path: str, folder: Path, most: int) -> StagedFile:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    state, size = hashlib.sha256(), 0
    with open(target, "xb") as out:
        for chunk in member.chunks():
            size += len(chunk)
            if size > most:
                raise UploadError(
                    f"{path} is larger than the {most:,} bytes that are left for it; send a smaller adapter, or ask "
                    "for a higher limit",
                    code="too_large",
                )
            state.update(chunk)
            out.write(chunk)
    return StagedFile(path, state.hexdigest(), size, target)
