"""The types every format is read into: rows of one site, and an adapter as a config plus its sites.

Works without torch where the tensors are `raw.RawTensor`, which is how uploads are checked.

Letters: R rank rows, I input width, O output width. Both factors are rank-major, so a row of A and the same row of B
are one unit; PEFT keeps B as [O, R] on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from loramux.formats.digest import tensor_digest
from loramux.formats.errors import FormatError, listed

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANK = 2**15


@dataclass(frozen=True, eq=False)
class SiteTensors:
    """The rows of one linear, in the file's dtype. `b` may be a transposed view of what was read."""

    a: Tensor  # [R, I]
    b: Tensor  # [R, O]
    magnitude: Tensor | None = None  # [O], DoRA

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def d_in(self) -> int:
        return int(self.a.shape[1])

    @property
    def d_out(self) -> int:
        return int(self.b.shape[1])

    @property
    def is_zero(self) -> bool:
        """A adds nothing: one of the factors is zero throughout."""
        return not (_has_value(self.b) and _has_value(self.a))


@dataclass(frozen=True, eq=False)
class AdapterTensors:
    """One adapter: the content of adapter_config.json and the sites in natural module order."""

    config: dict[str, Any]
    sites: dict[str, SiteTensors]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of both; computed when first asked for, which takes about as long as all the rest of reading."""
        return tensor_digest(self.config, named_tensors(self.sites))

    @classmethod
    def build(cls, config: Mapping[str, Any], sites: Mapping[str, SiteTensors]) -> AdapterTensors:
        """Order the sites; shapes are checked, the config is not."""
        ordered = {path: sites[path] for path in sorted(sites, key=natural_order)}
        check_shapes(ordered)
        return cls(dict(config), ordered)


def zero_sites(adapter: AdapterTensors) -> list[str]:
    """Sites whose rows add nothing, in order."""
    return [path for path, site in adapter.sites.items() if site.is_zero]


def refuse_no_op(sites: Mapping[str, SiteTensors], where: str) -> None:
    """Refuse an adapter that changes nothing anywhere."""
    if all(site.is_zero for site in sites.values()):
        raise FormatError(
            f"{where}: every B (or A) is zero, so the adapter changes nothing; it was never trained or the wrong "
            "file was saved. To resume training from it, load it as trainable",
            code="no_op",
        )


def _has_value(matrix: Tensor) -> bool:
    # One look answers for almost every trained matrix, and is a tenth of the price.
    return matrix[0, 0].item() != 0 or bool(matrix.any())


def natural_order(path: str) -> list[tuple[int, int, str]]:
    """Sort key: layer 2 before layer 10."""
    return [(0, int(p), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in path.split(".")]


def named_tensors(sites: Mapping[str, SiteTensors]) -> dict[str, Tensor]:
    """Site tensors under PEFT's names (without its prefix) and in PEFT's shapes."""
    named: dict[str, Tensor] = {}
    for path, site in sites.items():
        named[f"{path}.lora_A.weight"] = site.a
        named[f"{path}.lora_B.weight"] = site.b.t()
        if site.magnitude is not None:
            named[f"{path}.lora_magnitude_vector"] = site.magnitude
    return named


def check_shapes(sites: Mapping[str, SiteTensors], where: str = "adapter") -> None:
    """Every site is [R, I] and [R, O] with a sane R, and [O] where it has a magnitude."""
    if not sites:
        raise FormatError(f"{where} holds no LoRA tensors at all", code="missing_tensor")
    flat = [path for path, s in sites.items() if s.a.dim() != 2 or s.b.dim() != 2]
    if flat:
        raise FormatError(
            f"{where}: lora_A/lora_B of {listed(flat)} are not matrices; adapters of convolutions and of "
            "stacked expert weights are not supported, re-train with linear target_modules",
            code="shape",
        )
    unequal = [
        f"{path}: A {list(s.a.shape)}, B {list(s.b.t().shape)}"
        for path, s in sites.items()
        if s.a.shape[0] != s.b.shape[0]
    ]
    if unequal:
        raise FormatError(
            f"{where}: A is [rank, in] and B is [out, rank], but the ranks differ in {listed(unequal)}; "
            "the file mixes two adapters or was transposed",
            code="rank",
        )
    huge = [path for path, s in sites.items() if not 0 < s.rank <= MAX_RANK]
    if huge:
        raise FormatError(
            f"{where}: the rank of {listed(huge)} is not in 1..{MAX_RANK:,}; leave out sites without rows",
            code="rank",
        )
    odd = [
        path
        for path, s in sites.items()
        if s.magnitude is not None and tuple(s.magnitude.shape) != (s.d_out,)
    ]
    if odd:
        raise FormatError(
            f"{where}: lora_magnitude_vector of {listed(odd)} does not have one value per output",
            code="shape",
        )
