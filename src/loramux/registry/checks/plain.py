"""One PEFT folder against the base, without torch: what the format's own reader refuses, and what only the base shows.

The format's rules are `loramux.formats`'; here is what an upload has to prove beyond them: every module is a linear
of the base, every target has its tensors, no pattern is idle, numbers are finite, of a sane size, and not lost in
rounding.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.formats.errors import listed
from loramux.formats.fields import check_config
from loramux.formats.jsonio import read_json_object
from loramux.formats.patterns import PatternTable, target_test, worst_steps
from loramux.formats.peft import CONFIG_NAME, PREFIX, WEIGHTS_NAME, check_sites, collect_sites
from loramux.formats.raw import RawTensor, TensorInfo, check_infos, map_tensors
from loramux.formats.tensors import AdapterTensors, SiteTensors, refuse_no_op, zero_sites
from loramux.registry.checks.base import BaseShape
from loramux.registry.checks.errors import UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.norms import relative_norms
from loramux.registry.checks.stage import RECORD_NAME

MAX_NAMES = 4096  # in target_modules and the like
MAX_WORK = 1e8  # steps of all matches of all patterns, should every one go wrong: a second or two
DTYPES = ("F16", "BF16", "F32")
_SAFE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Plain:
    """An adapter that passed; `tensors` map the checked file."""

    tensors: AdapterTensors
    norms: dict[str, float]
    notes: tuple[str, ...]

    @property
    def max_rank(self) -> int:
        return max(site.rank for site in self.tensors.sites.values())


def check_plain(
    folder: Path, base: BaseShape, limits: UploadLimits, *, is_expert: bool = False
) -> Plain:
    """Check one folder. An expert of a mixture may be zero, and may leave out modules its siblings have."""
    config = read_json_object(folder / CONFIG_NAME)
    check_config(config, CONFIG_NAME)
    _check_work(config, base)
    raw = read_raw(folder / WEIGHTS_NAME, limits)
    _check_spelling(raw)
    sites: dict[str, SiteTensors] = collect_sites(raw, WEIGHTS_NAME)  # type: ignore[arg-type]
    _check_modules(sites, base)
    _check_patterns(config, sites)
    check_sites(config, sites, "the adapter")
    _check_shapes(sites, base)
    _check_ranks(sites, limits)
    if not is_expert:
        _check_targets(config, sites, base)
        refuse_no_op(sites, "the adapter")
    tensors = AdapterTensors.build(config, sites)
    norms = relative_norms(config, tensors.sites, base)
    _check_norms(norms, limits, is_expert)
    if (folder / RECORD_NAME).exists():
        check_record(read_json_object(folder / RECORD_NAME), sites, base)
    return Plain(tensors, norms, _notes(tensors))


def read_raw(
    path: Path, limits: UploadLimits, dtypes: tuple[str, ...] = DTYPES
) -> dict[str, RawTensor]:
    """The tensors of a staged file, mapped: intact, of these kinds, finite, within the limits."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if limits.max_header_bytes < length <= os.path.getsize(path):
        raise UploadError(
            f"{path.name}: the header has {length:,} bytes, at most {limits.max_header_bytes:,} are allowed; leave out "
            "metadata, or merge tensors that belong together",
            code="header_too_large",
        )
    raw = map_tensors(path)
    if len(raw) > limits.max_tensors:
        raise UploadError(
            f"{path.name} holds {len(raw):,} tensors, at most {limits.max_tensors:,} are allowed",
            code="too_many_tensors",
        )
    infos = {
        name: TensorInfo(_SAFE_NAMES.get(tensor.dtype, tensor.dtype), tensor.shape)
        for name, tensor in raw.items()
    }
    check_infos(infos, dtypes, path.name)
    bad = [name for name, tensor in raw.items() if not tensor.is_finite()]
    if bad:
        raise UploadError(
            f"{path.name}: {listed(bad)} hold NaN or infinite values; the training that made them diverged, use an "
            "earlier checkpoint",
            code="nonfinite",
        )
    return raw


def check_record(record: Mapping[str, Any], paths: Mapping[str, object], base: BaseShape) -> None:
    """The note loramux leaves beside a plain adapter: a sample of the weights it was trained on."""
    heads = {path: bytes.fromhex(base.heads[path]) for path in paths if path in base.heads}
    if len(heads) < len(paths):
        return  # nothing is known of a base that was described without its weights
    marks, sample = record.get("base_sites"), record.get("base_sample")
    if isinstance(marks, dict):
        found = {path: hashlib.sha256(head).hexdigest()[:16] for path, head in heads.items()}
        differs = any(marks.get(path, mark) != mark for path, mark in found.items())
    else:
        joined = b"".join(heads[path] for path in sorted(heads))
        differs = sample is not None and hashlib.sha256(joined).hexdigest() != sample
    if differs:
        raise UploadError(
            f"{RECORD_NAME} says that the adapter was trained on another base ({record.get('base_name')!r:.100}): the "
            f"weights of the linears it targets are not those of {base.name}; train it on this one",
            code="base_mismatch",
        )


def _check_work(config: Mapping[str, Any], base: BaseShape) -> None:
    """Every pattern may be harmless by itself; a thousand of them at every linear need not be."""
    long = [
        key
        for key, value in config.items()
        if isinstance(value, list | dict) and len(value) > MAX_NAMES
    ]
    if long:
        raise UploadError(
            f"{CONFIG_NAME}: {listed(long)} has more than {MAX_NAMES:,} entries; name modules by their endings",
            code="bad_value",
        )
    keys = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    layers = config.get("layers_pattern")
    names = [config.get(key) for key in ("target_modules", "exclude_modules")]
    names += layers if isinstance(layers, list) else [layers]
    letters = max(map(len, base.linears))
    # A key is tried five times at every dot of a path, a whole-path expression twice.
    each = sum(worst_steps(key, letters) for key in keys) * 5 * 6
    each += sum(worst_steps(name, letters) for name in names if isinstance(name, str)) * 2
    if each * len(base.linears) > MAX_WORK:
        raise UploadError(
            f"{CONFIG_NAME}: the patterns in rank_pattern, alpha_pattern and target_modules could take for ever to "
            "match; write module names out, or use fewer wildcards and alternatives",
            code="bad_pattern",
        )


def _check_spelling(raw: Mapping[str, RawTensor]) -> None:
    seen: dict[str, str] = {}
    for name in raw:
        other = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise UploadError(
                f"{listed([other, name])} differ by case or Unicode form only; keep the one that was trained",
                code="duplicate_tensor",
            )
    if raw and not any(name.startswith(PREFIX) for name in raw):
        raise UploadError(
            f"{listed(raw, 2)} lack the prefix {PREFIX!r} that PEFT puts before every module; save the adapter with "
            "PEFT, or put the prefix before the names",
            code="wrong_prefix",
        )


def _check_modules(sites: Mapping[str, SiteTensors], base: BaseShape) -> None:
    unknown = [path for path in sites if path not in base.linears]
    if unknown:
        raise UploadError(
            f"{listed(unknown, 3)} are no linears of the decoder layers of {base.name}, which has "
            f"{', '.join(_kinds(base.linears))}; the adapter belongs to another base, or targets what is not served",
            code="unknown_module",
        )
    turned = [path for path, site in sites.items() if _is_turned(site, *base.linears[path])]
    if turned:
        raise UploadError(
            f"A or B of {listed(turned, 3)} is transposed; A is [rank, in] and B is [out, rank]: "
            f"{_wanted(turned, base)}",
            code="transposed",
        )


def _is_turned(site: SiteTensors, d_in: int, d_out: int) -> bool:
    """One factor fits its linear only when turned. `b` is [rank, out] already, as `collect_sites` turned it."""
    a, b = tuple(site.a.shape), tuple(site.b.shape)
    if len(a) != 2 or len(b) != 2:
        return False
    return (a[1] != d_in and a[0] == d_in) or (b[1] != d_out and b[0] == d_out)


def _check_shapes(sites: Mapping[str, SiteTensors], base: BaseShape) -> None:
    wrong = [
        f"{path}: {site.d_in} -> {site.d_out}"
        for path, site in sites.items()
        if (site.d_in, site.d_out) != base.linears[path]
    ]
    if wrong:
        paths = [entry.partition(":")[0] for entry in wrong]
        raise UploadError(
            f"tensors do not fit {base.name} at {listed(wrong, 3)}; {_wanted(paths, base)}. The adapter was trained on "
            "another base",
            code="shape",
        )


def _check_ranks(sites: Mapping[str, SiteTensors], limits: UploadLimits) -> None:
    high = [f"{path}: {site.rank}" for path, site in sites.items() if site.rank > limits.max_rank]
    if high:
        raise UploadError(
            f"the rank of {listed(high, 3)} is over the limit of {limits.max_rank}; compress the adapter (loramux "
            "compose --max-rank) or ask for a higher limit",
            code="rank_limit",
        )


def _check_patterns(config: Mapping[str, Any], sites: Mapping[str, SiteTensors]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        pattern: Mapping[str, Any] = config.get(field) or {}
        if unused := PatternTable[Any](pattern, field).unused(sites):
            keys = list(pattern)
            raise UploadError(
                f"{CONFIG_NAME}: {field} has no effect for {listed(keys[i] for i in unused)}: no module with "
                "tensors has such a name that an earlier key has not taken. Correct the names or remove the keys",
                code="dead_pattern",
            )


def _check_targets(
    config: Mapping[str, Any], sites: Mapping[str, SiteTensors], base: BaseShape
) -> None:
    if config.get("target_modules") in (None, "all-linear"):
        return  # what that covers was PEFT's to say
    is_target = target_test(config)
    lacking = [path for path in base.linears if path not in sites and is_target(path)]
    if lacking:
        raise UploadError(
            f"target_modules covers {listed(lacking, 3)}, but there are no tensors for them; the file is incomplete, "
            "or target_modules (layers_to_transform, exclude_modules) says too much",
            code="missing_module",
        )


def _check_norms(norms: Mapping[str, float], limits: UploadLimits, is_expert: bool) -> None:
    high = [f"{path}: {value:.3g}" for path, value in norms.items() if not value <= limits.max_norm]
    if high:
        raise UploadError(
            f"the update of {listed(high, 3)} times the weight it is added to is over the limit of "
            f"{limits.max_norm:g}; lora_alpha is not the one it was trained with, or the training diverged",
            code="norm",
        )
    if not is_expert and max(norms.values()) < limits.min_norm:
        raise UploadError(
            f"the largest update is {max(norms.values()):.3g} of the weight it is added to, which every sum rounds "
            "away; the adapter changes nothing, it was never trained or the wrong file was saved",
            code="no_op",
        )


def _notes(tensors: AdapterTensors) -> tuple[str, ...]:
    zero = zero_sites(tensors)
    return (f"the rows of {listed(zero)} are zero and change nothing",) if zero else ()


def _kinds(paths: Mapping[str, object]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _wanted(paths: list[str], base: BaseShape) -> str:
    path = paths[0]
    d_in, d_out = base.linears[path]
    return f"{path} is {d_in} -> {d_out}"
