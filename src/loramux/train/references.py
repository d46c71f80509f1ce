"""The reference of preference training: what an answer's likelihood is under the base, or under a frozen adapter.

Why its values are kept: they never change, so a row's are computed when it is first seen, in a call of the shape that
its micro-batch has, and found by content from then on. They are part of a saved state: computed again in a call of
another shape they would round otherwise, and a resumed run would leave the unbroken one.

Letters: B rows, T tokens per row, S supervised positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.core.batch import IGNORED_LABEL
from loramux.data import Example
from loramux.errors import LoramuxError
from loramux.ops.cross_entropy import token_losses
from loramux.recipe import DpoConfig, JobRecipe
from loramux.train.attention import fastest_attention

if TYPE_CHECKING:
    from loramux.api import Handle
    from loramux.train.loss import SupervisedForward

BASE = "base"


class PreferenceError(LoramuxError):
    """A reference that cannot serve."""


def row_log_probs(logits_SV: Tensor, target_S: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed log-probability [B] of each row's supervised tokens, in fp32 (fp64 stays); S goes row by row."""
    log_S = -token_losses(logits_SV, target_S)
    counts = (labels_BT[:, 1:] != IGNORED_LABEL).sum(1).tolist()
    return torch.stack([own.sum() for own in log_S.split(counts)])


class References:
    """Log-probabilities of rows under the reference, by content; `name` is an adapter on the handle, None the base."""

    def __init__(self, job: str, name: str | None, handle: Handle, forward: SupervisedForward):
        self.job = job
        self.name = name
        self.handle = handle
        self.forward = forward
        self.known: dict[bytes, float] = {}
        self.digest = _digest(_reference(job, name, handle))

    def of(self, batch: Mapping[str, Any], examples: Sequence[Example]) -> Tensor:
        """[B], in fp64; a micro-batch with a row that was not seen yet is a model call."""
        keys = [_key(example) for example in examples]
        if any(key not in self.known for key in keys):
            for key, value in zip(keys, self._compute(batch).tolist(), strict=True):
                self.known.setdefault(key, value)
        return torch.tensor([self.known[key] for key in keys], dtype=torch.float64)

    @torch.no_grad()
    def _compute(self, batch: Mapping[str, Any]) -> Tensor:
        model, active = self.forward.model, self.handle.dispatch.active
        weight, training = next(model.parameters()), model.training
        self.handle.use(self.name)
        model.eval()
        try:
            with fastest_attention(weight.device, weight.dtype, batch["input_ids"].shape[1]):
                logits_SV, target_S = self.forward.predictions(batch)
            return row_log_probs(logits_SV, target_S, batch["labels"])
        finally:
            model.train(training)
            self.handle.use(active)

    def tensors(self) -> dict[str, Tensor]:
        keys = [torch.frombuffer(bytearray(key), dtype=torch.uint8) for key in self.known]
        return {
            "adapter": torch.frombuffer(bytearray(self.digest), dtype=torch.uint8),
            "rows": torch.stack(keys) if keys else torch.zeros(0, 32, dtype=torch.uint8),
            "values": torch.tensor(list(self.known.values()), dtype=torch.float64),
        }

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        if bytes(saved["adapter"].tolist()) != self.digest:
            raise PreferenceError(
                f"job {self.job!r}: the reference {self.name!r} is not the one that the run began with; put it back, "
                "or start anew in another folder"
            )
        values = saved["values"].tolist()
        self.known = dict(zip((bytes(row) for row in saved["rows"].tolist()), values, strict=True))


def _reference(job: str, name: str | None, handle: Handle) -> Any:
    """The reference adapter: it must be there and must not learn."""
    if name is None:
        return None
    if name not in handle.adapters:
        raise PreferenceError(
            f"job {job!r}: no adapter named {name!r} is attached to serve as its reference; there are "
            f"{list(handle.adapters)}. Load it with handle.load(folder, name={name!r}), or say reference: base"
        )
    adapter = handle.adapters[name]
    if adapter.trainable():
        raise PreferenceError(
            f"job {job!r}: the reference {name!r} is being trained; load a frozen copy of it under another name"
        )
    return adapter


def _digest(adapter: Any) -> bytes:
    if adapter is None:
        return b"\0" * 32
    from loramux.formats.digest import tensor_digest

    config = adapter.method.identity()
    return bytes.fromhex(tensor_digest({"config": repr(config)}, adapter.state_dict()))


def _key(example: Example) -> bytes:
    state = hashlib.sha256(array("q", [len(example), *example.input_ids]).tobytes())
    state.update(bytes(example.loss_mask))
    state.update(example.task.encode())
    return state.digest()


# --- From a recipe --------------------------------------------------------------------------------


def named_objective(job: JobRecipe) -> DpoConfig | None:
    """The objective of a job, its reference as the name that `load_reference` gives it: by content, not by place."""
    folder = _folder(job)
    if job.objective is None or folder is None:
        return job.objective
    return job.objective.model_copy(update={"reference": _name(folder)})


def start_folder(job: JobRecipe) -> Path | None:
    """The adapter that a job's own begins as a copy of, if it asked for that."""
    starts = job.objective is not None and job.objective.start == "reference"
    return _folder(job) if starts else None


def load_reference(handle: Handle, job: JobRecipe) -> None:
    """Put a job's reference on the handle, frozen; jobs with the same one share it. Check what begins as its copy."""
    folder = _folder(job)
    if folder is None:
        return
    if (name := _name(folder)) not in handle.adapters:
        handle.load(folder, name=name)
    own = handle.adapters[job.name].method.config
    wanted = {"name": job.method.name, "r": job.method.fields.get("r", own.r)}
    found = {"name": own.method, "r": own.r}
    if start_folder(job) is not None and found != wanted:
        raise PreferenceError(
            f"job {job.name!r} begins as its reference, which is {found}, but its method says {wanted}; make them equal"
        )


def _folder(job: JobRecipe) -> Path | None:
    if job.objective is None or job.objective.reference == BASE:
        return None
    folder = Path(job.objective.reference).expanduser()
    if not folder.is_dir():
        raise PreferenceError(
            f"job {job.name!r}: no adapter folder at {str(folder)!r} to serve as its reference; give the folder of a "
            "saved adapter, or reference: base"
        )
    return folder


def _name(folder: Path) -> str:
    """The same for folders with the same files."""
    from loramux.formats.digest import folder_digest

    return f"reference-{folder_digest(folder)[:16]}"
