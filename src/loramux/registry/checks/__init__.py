"""Upload checks: what is refused, before anything is stored.

    base = base_shape("path/to/checkpoint")
    with check_upload(from_archive("adapter.zip"), base) as checked:
        ...  # checked.files are verified copies, gone when the block ends

Nothing is unpacked, unpickled, imported or fetched because an upload says so. Plain PEFT folders are checked without
torch; mixtures need it, as only their method knows what its router holds.
"""

from loramux.registry.checks.archives import from_archive
from loramux.registry.checks.base import BaseShape, base_shape, shape_of_model
from loramux.registry.checks.check import Checked, check_upload
from loramux.registry.checks.errors import CODES, UploadError
from loramux.registry.checks.limits import UploadLimits
from loramux.registry.checks.sources import Source, from_folder, from_members
from loramux.registry.checks.stage import StagedFile

__all__ = [
    "CODES",
    "BaseShape",
    "Checked",
    "Source",
    "StagedFile",
    "UploadError",
    "UploadLimits",
    "base_shape",
    "check_upload",
    "from_archive",
    "from_folder",
    "from_members",
    "shape_of_model",
]
