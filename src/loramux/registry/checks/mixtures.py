"""A mixture against the base: every expert as an adapter of its own, the rest by the reader that will load it.

Needs torch: only a method knows what its router holds. Routers are built on torch's meta device, so that settings that
ask for a terabyte cost nothing, and compared with the tensors that came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loramux.formats.errors import FormatError
from loramux.formats.jsonio import canonical_json, read_json_object
from loramux.formats.mixture_header import EXPERTS_NAME, check_header
from loramux.formats.peft import MIXTURE_NAME
from loramux.formats.raw import STATE
from loramux.methods import own_names
from loramux.registry.checks.base import BaseShape
from loramux.registry.checks.errors import CODES, UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.plain import Plain, check_plain, read_raw
from loramux.registry.checks.stage import ROUTER_NAME, Staged
from loramux.registry.names import shown

if TYPE_CHECKING:
    from loramux.formats.mixture import MixtureTensors
    from loramux.registry.checks.check import Checked

IN_MEMORY = "model:"  # how the digest of a base that had no folder begins; it cannot be compared
LARGEST_SETTING = (
    2**13
)  # of a whole number in a method's settings: counts and widths; modules are made of some
MOST_VALUES = 100_000  # in a method's settings, nested ones included


def check_mixture(
    staged: Staged, base: BaseShape, limits: UploadLimits, notes: tuple[str, ...]
) -> Checked:
    """Check a staged mixture; raises UploadError or FormatError."""
    from loramux.registry.checks.check import Checked

    header = read_json_object(staged.folder / MIXTURE_NAME)
    check_header(header, MIXTURE_NAME)
    _check_settings(header, limits)
    base_notes = _check_base(header, base)
    experts = {
        entry["name"]: _expert(staged, entry["path"], base, limits) for entry in header["experts"]
    }
    read_raw(staged.folder / ROUTER_NAME, limits, STATE)
    saved = _read(staged, base)
    parts = {f"{EXPERTS_NAME}/{name}": plain.tensors.digest for name, plain in experts.items()}
    return Checked(
        files=staged.files,
        folder=staged.folder,
        digest=mixture_digest(header, parts, saved.router_digest),
        base_digest=base.digest,
        method=saved.method,
        servability=saved.servability,
        max_rank=max(plain.max_rank for plain in experts.values()),
        num_bytes=sum(file.num_bytes for file in staged.files),
        config=saved.config,
        modules=saved.sites,
        norms=_largest(experts),
        notes=notes + base_notes,
        experts={name: plain.tensors.digest for name, plain in experts.items()},
    )


def mixture_digest(header: Mapping[str, Any], experts: Mapping[str, str], router: str) -> str:
    """SHA-256 over the canonical JSON of [[relative path, digest of that part], ...] in order of the paths."""
    own = hashlib.sha256(canonical_json(dict(header))).hexdigest()
    parts = sorted([*experts.items(), (MIXTURE_NAME, own), (ROUTER_NAME, router)])
    return hashlib.sha256(canonical_json([list(part) for part in parts])).hexdigest()


def _check_settings(header: Mapping[str, Any], limits: UploadLimits) -> None:
    """Before anything is built from them: the method is ours, and no number is beyond all use."""
    method = header["method"]
    if method not in own_names():
        raise UploadError(
            f"the mixture's method {shown(method)} is none of {', '.join(own_names())}; save it with a method of this "
            "loramux",
            code="method",
        )
    if len(header["experts"]) > limits.max_experts:
        raise UploadError(
            f"the mixture has {len(header['experts']):,} experts, at most {limits.max_experts:,} are allowed",
            code="bad_value",
        )
    _check_size(header["config"])


def _check_size(config: Mapping[str, Any]) -> None:
    left, waiting = MOST_VALUES, [config]
    while waiting:
        value: Any = waiting.pop()
        left -= 1
        if left < 0 or (isinstance(value, int) and abs(value) > LARGEST_SETTING):
            raise UploadError(
                f"{MIXTURE_NAME}: config holds a whole number over {LARGEST_SETTING:,} or more than {MOST_VALUES:,} "
                "values, which no method needs; restore the file",
                code="bad_value",
            )
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _check_base(header: Mapping[str, Any], base: BaseShape) -> tuple[str, ...]:
    noted = header["base_digest"]
    if noted is None or noted.startswith(IN_MEMORY):
        return ("the mixture does not say which base it was trained on",)
    if noted != base.digest:
        raise UploadError(
            f"the mixture was trained on another base ({shown(header['base_model_name_or_path'] or 'unnamed')}, digest "
            f"{shown(noted[:12])}) than {base.name} (digest {base.digest[:12]}); train it on this one",
            code="base_mismatch",
        )
    return ()


def _expert(staged: Staged, path: str, base: BaseShape, limits: UploadLimits) -> Plain:
    try:
        return check_plain(staged.folder / path, base, limits, is_expert=True)
    except (FormatError, UploadError) as error:
        raise UploadError(f"{path}: {error}", code=error.code) from None


def _read(staged: Staged, base: BaseShape) -> MixtureTensors:
    import torch

    from loramux.formats.mixture import read_mixture
    from loramux.persist.read import mixture_adapter
    from loramux.persist.routers import check_routers

    saved = read_mixture(staged.folder)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            adapter = mixture_adapter(base.sites, saved, "upload")
        _check_servability(adapter.method.servability, saved)
        check_routers(adapter, saved.router)
    except UploadError:
        raise
    except FormatError as error:
        code = error.code if error.code in CODES and error.code != "format" else "bad_mixture"
        raise UploadError(str(error), code=code) from None
    except (
        ValueError,
        TypeError,
        RuntimeError,
        LookupError,
        ArithmeticError,
        AttributeError,
    ) as error:
        # A method's own code meets settings of any type: whatever it raises, the settings are at fault.
        raise UploadError(
            f"{MIXTURE_NAME}: {saved.method} cannot be built from these settings: {error}",
            code="bad_mixture",
        ) from None
    return saved


def _check_servability(wanted: str, saved: MixtureTensors) -> None:
    if saved.servability != wanted:
        raise UploadError(
            f"{MIXTURE_NAME}: servability is {saved.servability!r}, but {saved.method} with these settings is "
            f"{wanted!r}; restore the file",
            code="bad_value",
        )


def _largest(experts: Mapping[str, Plain]) -> dict[str, float]:
    norms: dict[str, float] = {}
    for plain in experts.values():
        for path, value in plain.norms.items():
            norms[path] = max(value, norms.get(path, 0.0))
    return norms
