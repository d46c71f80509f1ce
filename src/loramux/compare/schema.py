"""What a suite may say: every key, its type, its default and its limits.

Why strict, as a recipe is: a misspelt key that is ignored costs hours here. What a method may change of the training
is listed by name, so that no entry can buy itself more tokens, larger batches or another number of steps.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from loramux.errors import LoramuxError, suggest
from loramux.recipe import DataSource, MethodSpec

LABEL = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"


class SuiteError(LoramuxError):
    """A suite is not valid, or cannot be run as it is."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Strict):
    """One task: rows to train on, rows to measure on. In a suite a folder stands for its three splits."""

    train: DataSource
    test: DataSource
    validation: DataSource | None = None


class Budget(_Strict):
    """Trainable parameters that every method gets, routers and gates included.

    `of`: those of this method of the suite, as it is written there; or `parameters` as a number. tolerance: share of
    the budget that a method may miss it by.
    """

    of: str | None = None
    parameters: int | None = Field(None, ge=1)
    tolerance: float = Field(0.03, gt=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.of is None) == (self.parameters is None):
            raise ValueError("give exactly one of `of` (a method's label) and `parameters`")
        return self


class Training(_Strict):
    """What all methods share. Without `learning_rate` each method takes its own default."""

    learning_rate: float | None = Field(None, gt=0)
    micro_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: float = Field(0.06, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    group_by_length: bool = True


class OwnTraining(_Strict):
    """What a method may have otherwise: nothing that changes which tokens it sees, or how often."""

    learning_rate: float | None = Field(None, gt=0)
    scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0)
    max_grad_norm: float | None = Field(None, gt=0)


class Entry(_Strict):
    """One method of the suite.

    method: name and fields, as in a recipe. match: the field that is searched so that the trainable parameters meet
    the budget; `budget` gives a field of that name the number itself; null takes the method as it is written.
    unmatched: keep it even if the budget cannot be met. scale: lora_alpha over the field that is searched; the suite's
    without it, and the method's own lora_alpha, if one is given, before both. seeds: the suite's without it.
    """

    method: MethodSpec
    match: str | None = "r"
    unmatched: bool = False
    scale: float | None = Field(None, gt=0)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    training: OwnTraining = OwnTraining()
    note: str = ""

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


class Part(_Strict):
    """A part of the suite: which methods train on which tasks, for how many steps. null: all of them."""

    steps: int = Field(ge=1)
    methods: tuple[str, ...] | None = Field(None, min_length=1)
    tasks: tuple[str, ...] | None = Field(None, min_length=1)


class Fusion(_Strict):
    """Several trained adapters over one base, frozen, put together in different ways.

    adapters: the method of the suite whose single-task adapters are taken. rows: training rows of each task that a
    way of fusing may learn from. methods: names of ways, or names with options.
    """

    adapters: str
    steps: int = Field(25, ge=1)
    rows: int = Field(50, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    tasks: tuple[str, ...] | None = Field(None, min_length=2)
    methods: dict[str, dict[str, Any]] | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A list of names stands for names without options."""
        if isinstance(given, list):
            return {str(name): {} for name in given}
        return {k: v or {} for k, v in given.items()} if isinstance(given, dict) else given


class Suite(_Strict):
    """The whole file. `base` is a name that `loramux fetch` knows, a local folder or a hub id."""

    name: str = Field(pattern=LABEL)
    base: str = Field(min_length=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    threads: int | None = Field(1, ge=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    budget: Budget
    reference: str = "lora"
    scale: float = Field(2.0, gt=0, description="lora_alpha / r, where nothing else is said")
    sequence_len: int = Field(256, ge=2)
    train_rows: int | None = Field(None, ge=1, description="of each task; all without it")
    validation_rows: int = Field(0, ge=0, description="of each task; 0 trains without validation")
    test_rows: int | None = Field(None, ge=1, description="of each task; all without it")
    metric: str = "token"
    eval_batch_size: int = Field(16, ge=1)
    decode_rounds: int = Field(12, ge=0, description="paired rounds of the decode cost; 0: none")
    limit_minutes: float | None = Field(None, gt=0, description="a row that takes longer fails")
    training: Training = Training()
    tasks: dict[str, Task] = Field(min_length=1)
    methods: dict[str, Entry] = Field(min_length=1)
    single: Part | None = None
    multi: Part | None = None
    fusion: Fusion | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if self.single is None and self.multi is None and self.fusion is None:
            raise ValueError("nothing to compare: give at least one of single, multi and fusion")
        _known("reference", self.reference, self.methods)
        if self.budget.of is not None:
            _known("budget.of", self.budget.of, self.methods)
        for name, part in (("single", self.single), ("multi", self.multi)):
            for label in (part.methods or ()) if part else ():
                _known(f"{name}.methods", label, self.methods)
            for task in (part.tasks or ()) if part else ():
                _known(f"{name}.tasks", task, self.tasks)
        self._check_seeds()
        if self.fusion is not None:
            _known("fusion.adapters", self.fusion.adapters, self.methods)
            for task in self.fusion.tasks or ():
                _known("fusion.tasks", task, self.tasks)
            if len(self.fusion.tasks or self.tasks) < 2:
                raise ValueError("fusion: needs at least two tasks, an adapter for each")
        return self

    def _check_seeds(self) -> None:
        named = {f"methods.{label}.seeds": entry.seeds for label, entry in self.methods.items()}
        if self.fusion is not None:
            named["fusion.seeds"] = self.fusion.seeds
        for where, seeds in {"seeds": self.seeds, **named}.items():
            if seeds and len(set(seeds)) != len(seeds):
                raise ValueError(f"{where}: a seed is given twice, got {list(seeds)}")

    def seeds_of(self, label: str) -> tuple[int, ...]:
        return self.methods[label].seeds or self.seeds


def _known(where: str, name: str, allowed: dict[str, Any]) -> None:
    if name not in allowed:
        raise ValueError(f"{where}: unknown name {name!r}; {suggest(name, allowed)}")
