"""One upload from parcel to verdict: staged, checked, described; gone again unless it is taken over meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loramux.formats.errors import FormatError
from loramux.registry.checks.base import BaseShape
from loramux.registry.checks.errors import CODES, UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.plain import check_plain
from loramux.registry.checks.sources import Source
from loramux.registry.checks.stage import Staged, StagedFile, stage

DEFAULT_LIMITS = UploadLimits()


@dataclass(frozen=True)
class Checked:
    """An upload that passed. `files` are copies in a private folder that ends with `check_upload`'s block.

    `digest`: for a plain adapter that of `loramux.formats` over its config and tensors; for a mixture SHA-256 over the
    canonical JSON of [(relative path, digest of that part)]. `norms`: how much each module is changed, relative to its
    weight; of a mixture the largest of its experts'.
    """

    files: tuple[StagedFile, ...]
    folder: Path
    digest: str
    base_digest: str | None
    method: str
    servability: str
    max_rank: int
    num_bytes: int
    config: dict[str, Any]
    modules: tuple[str, ...]
    norms: dict[str, float]
    notes: tuple[str, ...] = ()
    experts: dict[str, str] = field(default_factory=dict)  # of a mixture: name -> digest


@contextlib.contextmanager
def check_upload(
    source: Source,
    base: BaseShape,
    limits: UploadLimits = DEFAULT_LIMITS,
    *,
    staging: str | os.PathLike[str] | None = None,
) -> Iterator[Checked]:
    """Check a parcel against a base; raises UploadError, and nothing is left of it then.

    staging: an existing folder to copy to (default: the system's temporary one); give one on the disk of the store.
    """
    folder = Path(tempfile.mkdtemp(prefix="upload-", dir=staging))
    try:
        try:
            staged = stage(source, folder, limits)
            checked = _check(staged, base, limits)
        except FormatError as error:
            raise as_upload_error(error, folder) from None
        yield checked
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def as_upload_error(error: FormatError, folder: Path) -> UploadError:
    """The same refusal with the names a sender knows: where the copy lies is nobody's business."""
    text = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the upload")
    return UploadError(text, code=error.code if error.code in CODES else "format")


def _check(staged: Staged, base: BaseShape, limits: UploadLimits) -> Checked:
    notes = (f"left out: {', '.join(staged.ignored)}",) if staged.ignored else ()
    if staged.is_mixture:
        # Lazily: it needs torch.
        from loramux.registry.checks.mixtures import check_mixture

        return check_mixture(staged, base, limits, notes)
    plain = check_plain(staged.folder, base, limits)
    return Checked(
        files=staged.files,
        folder=staged.folder,
        digest=plain.tensors.digest,
        base_digest=base.digest,
        method="lora",
        servability="static",
        max_rank=plain.max_rank,
        num_bytes=sum(file.num_bytes for file in staged.files),
        config=plain.tensors.config,
        modules=tuple(plain.tensors.sites),
        norms=plain.norms,
        notes=notes + plain.notes,
    )
