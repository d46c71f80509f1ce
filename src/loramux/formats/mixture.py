"""A mixture on disk: one plain PEFT folder per expert, one config, one router file, all bound by digests.

    mixture_config.json                    method, settings, base digest, experts by digest
    router.safetensors                     everything that decides who answers
    experts/NAME/adapter_config.json       each loads alone in PEFT, vLLM, SGLang, ...
    experts/NAME/adapter_model.safetensors

The top folder holds no adapter_config.json on purpose: PEFT only warns about keys it does not know, so a mixture it
could open would be half an answer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loramux.formats.digest import tensor_digest
from loramux.formats.errors import FormatError, listed
from loramux.formats.files import is_real_folder, recover_folder, replace_folder
from loramux.formats.jsonio import canonical_json, parse_json, read_json_object, write_json
from loramux.formats.mixture_header import EXPERTS_NAME, SCHEMA_VERSION, check_header
from loramux.formats.peft import CONFIG_NAME, MIXTURE_NAME, WEIGHTS_NAME, read_peft, write_peft
from loramux.formats.raw import STATE
from loramux.formats.storage import check_finite, read_tensors, write_tensors
from loramux.formats.tensors import AdapterTensors, natural_order, refuse_no_op

ROUTER_NAME = "router.safetensors"
# Files that could be taken for weights of this mixture; anything else at the top is the user's and kept.
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".npz")


@dataclass(frozen=True, eq=False)
class MixtureTensors:
    """A mixture, read and verified. `digest` covers config, router and experts: the key for anything cached."""

    method: str
    config: dict[str, Any]
    servability: str
    base_name: str | None
    base_digest: str | None
    base_dtype: str | None
    experts: dict[str, AdapterTensors]
    router: dict[str, Tensor]
    router_digest: str
    sites: tuple[str, ...]
    digest: str


def is_mixture(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder says it is a mixture; its content is not checked."""
    folder = Path(folder)
    recover_folder(folder)
    return (folder / MIXTURE_NAME).is_file()


def write_mixture(
    folder: str | os.PathLike[str],
    *,
    method: str,
    config: Mapping[str, Any],
    servability: str,
    base_digest: str | None,
    base_name: str | None,
    experts: Mapping[str, AdapterTensors],
    router: Mapping[str, Tensor],
    base_dtype: str | None = None,
) -> str:
    """Write or replace a mixture in one step and return its digest; a folder that is not a mixture is left alone."""
    target = Path(os.path.abspath(folder))
    check_finite(router, "the router to write")
    # Configs are plain dicts: what is hashed must be what is written, not what was true when they were built.
    experts = {name: AdapterTensors.build(e.config, e.sites) for name, e in experts.items()}
    settings = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "servability": servability,
        "config": dict(config),
        "base_model_name_or_path": base_name,
        "base_digest": base_digest,
        "base_dtype": base_dtype,
        "experts": [
            {"name": name, "path": f"{EXPERTS_NAME}/{name}", "digest": expert.digest}
            for name, expert in experts.items()
        ],
        "router": tensor_digest({}, router),
        "sites": _all_sites(experts),
    }
    # As a reader will see it: lists for tuples, text for other keys.
    header = parse_json(canonical_json(settings), "the mixture to write")
    check_header(header, "the mixture to write")
    recover_folder(target)
    kept = _check_replaceable(target)

    def fill(part: Path) -> None:
        for name, expert in experts.items():
            write_peft(part / EXPERTS_NAME / name, expert)
        write_tensors(part / ROUTER_NAME, router)
        write_json(part / MIXTURE_NAME, header)
        for path in kept:
            shutil.copy2(path, part / path.name, follow_symlinks=False)

    target.parent.mkdir(parents=True, exist_ok=True)
    replace_folder(target, fill)
    return _digest_of(header)


def read_mixture(folder: str | os.PathLike[str], *, allow_zero: bool = False) -> MixtureTensors:
    """Read a mixture and verify every digest; raises FormatError and returns nothing by halves.

    Single experts may be zero (never chosen in training); a mixture of nothing but zeros needs `allow_zero`.
    """
    folder = Path(folder)
    recover_folder(folder)
    header_path = folder / MIXTURE_NAME
    if not os.path.lexists(header_path):
        raise FormatError(
            f"{folder} is not a mixture: {MIXTURE_NAME} is missing", code="missing_file"
        )
    header = read_json_object(header_path)
    check_header(header, str(header_path))
    names = [entry["name"] for entry in header["experts"]]
    _check_layout(folder, names)
    experts = {
        entry["name"]: _read_expert(folder / entry["path"], entry["digest"])
        for entry in header["experts"]
    }
    router = read_tensors(folder / ROUTER_NAME, dtypes=STATE)
    _check_digest(folder / ROUTER_NAME, tensor_digest({}, router), header["router"])
    if header["sites"] != _all_sites(experts):
        raise FormatError(
            f"{header_path}: sites are not those of the experts; save the mixture again",
            code="digest",
        )
    if not allow_zero:
        every = {f"{name}/{p}": s for name, e in experts.items() for p, s in e.sites.items()}
        refuse_no_op(every, str(folder))
    return MixtureTensors(
        method=header["method"],
        config=header["config"],
        servability=header["servability"],
        base_name=header["base_model_name_or_path"],
        base_digest=header["base_digest"],
        base_dtype=header["base_dtype"],
        experts=experts,
        router=router,
        router_digest=header["router"],
        sites=tuple(header["sites"]),
        digest=_digest_of(header),
    )


def _read_expert(folder: Path, digest: str) -> AdapterTensors:
    expert = read_peft(folder, allow_zero=True)
    _check_digest(folder, expert.digest, digest)
    return expert


def _check_digest(path: Path, found: str, recorded: str) -> None:
    if found != recorded:
        raise FormatError(
            f"{path} was changed after the mixture was saved: digest {found[:12]}, recorded {recorded[:12]}. "
            "Restore the file, or compose the mixture again from its parts",
            code="digest",
        )


def _check_layout(folder: Path, names: list[str]) -> None:
    """Exactly the listed experts, in real folders, and nothing else that could be taken for weights."""
    if os.path.lexists(folder / CONFIG_NAME):
        raise FormatError(
            f"{folder} holds both {MIXTURE_NAME} and {CONFIG_NAME}; remove the one that does not belong",
            code="extra_file",
        )
    experts = folder / EXPERTS_NAME
    for path in (experts, *(experts / name for name in names)):
        if not is_real_folder(path):
            raise FormatError(
                f"{path} is missing or a link; every expert is a folder of its own inside the mixture",
                code="unsafe_path" if path.is_symlink() else "missing_file",
            )
    extra = [path.name for path in sorted(experts.iterdir()) if path.name not in names]
    allowed = {ROUTER_NAME: folder, WEIGHTS_NAME: None}
    for inside in (folder, *(experts / name for name in names)):
        extra += [
            str(path.relative_to(folder))
            for path in sorted(inside.iterdir())
            if path.name.endswith(_WEIGHT_ENDINGS)
            and not (path.name in allowed and allowed[path.name] in (None, inside))
        ]
    if extra or os.path.lexists(folder / WEIGHTS_NAME):
        raise FormatError(
            f"{folder} holds what {MIXTURE_NAME} does not list: {listed(extra or [WEIGHTS_NAME])}; remove it",
            code="extra_file",
        )


def _check_replaceable(target: Path) -> list[Path]:
    """The user's own top-level files (a README, a recipe) to carry over; refuses any folder we did not write."""
    if not os.path.lexists(target):
        return []
    if not is_real_folder(target):
        raise FormatError(f"{target} is not a folder; choose another", code="not_ours")
    entries = sorted(target.iterdir())
    if not entries:
        return []
    ours = {MIXTURE_NAME, ROUTER_NAME, EXPERTS_NAME}
    foreign = [
        path.name
        for path in entries
        if path.name not in ours
        and (path.is_symlink() or not path.is_file() or path.name.endswith(_WEIGHT_ENDINGS))
    ]
    if foreign or not (target / MIXTURE_NAME).is_file() or (target / CONFIG_NAME).exists():
        raise FormatError(
            f"{target} is not a mixture folder of ours and will not be replaced (it holds "
            f"{listed(foreign or [path.name for path in entries])}); choose an empty or new folder",
            code="not_ours",
        )
    return [path for path in entries if path.name not in ours]


def _digest_of(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(header))).hexdigest()


def _all_sites(experts: Mapping[str, AdapterTensors]) -> list[str]:
    return sorted({path for e in experts.values() for path in e.sites}, key=natural_order)
