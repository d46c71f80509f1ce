"""What a failure of one job is called, and giving back the memory it held."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import torch

from loramux.train.parallel.group import ParallelError

if TYPE_CHECKING:
    from loramux.train.runner import JobRunner

log = logging.getLogger(__name__)
_CPU_ALLOCATOR = (
    "can't allocate memory",
    "not enough memory",
)  # its errors have no type of their own


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR)


def describe(error: BaseException, where: str) -> tuple[str, str]:
    """(what happened, what to do) for a job's reason."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:297]}..."
    if is_out_of_memory(error):
        return (
            f"{where} ran out of memory even alone ({text})",
            "Lower micro_batch_size or data.sequence_len, or set gradient_checkpointing",
        )
    return (
        f"{where} failed with {type(error).__name__}: {text}",
        "The other jobs were not touched; correct this one and start it again",
    )


def free_memory() -> None:
    """Give back what a failed call left: its tensors hang in reference cycles of frames and graphs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OwnFault:
    """What goes wrong inside stops this one job, with its reason."""

    def __init__(self, runner: JobRunner, what: str):
        self.runner = runner
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ParallelError):
            return False
        log.debug("job %s", self.runner.job.name, exc_info=error)
        step = self.runner.state.step + 1
        self.runner.fail(*describe(error, f"{self.what} step {step}"))
        free_memory()
        return True
