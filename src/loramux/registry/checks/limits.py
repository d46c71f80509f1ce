"""What an upload may cost, before it is known to be of any use."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class UploadLimits:
    """Bounds of one upload. The defaults admit rank 256 at every linear of a 70B base in bf16."""

    max_rank: int = 256
    max_bytes: int = 8192 * MIB  # all files together, as unpacked
    max_members: int = 1024  # of an archive or a folder, the ignored ones included
    max_ratio: int = 200  # unpacked over packed
    max_json_bytes: int = MIB
    max_header_bytes: int = 4 * MIB
    max_tensors: int = 20_000  # per file
    max_experts: int = 256
    max_norm: float = 100.0  # of an update, relative to the weight it is added to
    min_norm: float = (
        1e-8  # of the largest update; below it nothing of the sum changes, not even in fp32
    )

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise ValueError(f"limits must be positive: {', '.join(wrong)}")
