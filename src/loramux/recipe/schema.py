"""What a recipe may say: every key, its type, its default and its limits.

Why strict: a misspelt key that is silently ignored costs a training run. How the keys of several jobs come together
is in `resolve.py`, how a file is read in `load.py`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from loramux.recipe.sizes import parse_bytes

DEMO_PREFIX = "demo:"
# Pydantic puts the tag of a union's member into the path of an error; `problems.py` takes them out.
UNION_TAGS = ("named template", "text template")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(_Strict):
    """Where rows come from, and which of them.

    `path`: a .jsonl or .parquet file, a folder of splits, `demo:TASK/SPLIT.jsonl` or a hub dataset id.
    """

    path: str = Field(min_length=1)
    rows: int | None = Field(None, ge=1, description="at most so many rows; all without it")
    skip: int = Field(0, ge=0, description="leave out the first rows")
    task: str | None = Field(None, description="task name of every row; else the row's own")
    split: str | None = Field(None, description="file of a folder, or split of a hub dataset")


class TextTemplate(_Strict):
    """Prompt and completion with the row's keys in braces; the end token is added by itself."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)

    @field_validator("prompt", "completion")
    @classmethod
    def _is_a_format(cls, text: str) -> str:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise ValueError(f"is not a template: {error}") from None
        if not all(name.isidentifier() for name in names):
            raise ValueError(f"names in braces must be keys of a row, got {names}")
        return text

    def fields(self) -> list[str]:
        """The row keys it needs, in order of appearance."""
        parts = [*string.Formatter().parse(self.prompt), *string.Formatter().parse(self.completion)]
        return list(dict.fromkeys(name for _, name, _, _ in parts if name))

    def fill_prompt(self, row: Mapping[str, Any]) -> str:
        return self.prompt.format_map(row)

    def fill_completion(self, row: Mapping[str, Any]) -> str:
        return self.completion.format_map(row)


def _template_kind(value: Any) -> str:
    return UNION_TAGS[0] if isinstance(value, str) else UNION_TAGS[1]


Template = Literal["task", "chat"] | TextTemplate
_TemplateField = Annotated[
    Annotated[Literal["task", "chat"], Tag(UNION_TAGS[0])]
    | Annotated[TextTemplate, Tag(UNION_TAGS[1])],
    Discriminator(_template_kind),
]


class DataConfig(_Strict):
    train: tuple[DataSource, ...] = ()
    validation: tuple[DataSource, ...] = ()
    template: _TemplateField = "task"
    sequence_len: int = Field(512, ge=2)
    packing: bool = False


class StopConfig(_Strict):
    """When a job is stopped before its last step, by its training loss alone; `stop: true` takes the defaults."""

    warmup: int = Field(50, ge=0, description="steps before any rule; at least a tenth of all")
    every: int = Field(10, ge=1, description="steps between evaluations of the smoothed loss")
    diverged: bool = Field(True, description="twice its lowest loss for 20 steps")
    converged: bool = Field(True, description="hardly any gain over `patience` evaluations")
    patience: int = Field(5, ge=1)
    min_gain: float = Field(1e-3, gt=0, lt=1, description="of converged: share of the loss")
    predicted_gain: float | None = Field(
        None, gt=0, lt=1, description="stop if a power law through the losses says less than this"
    )


def _stop_switch(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


class TrainingConfig(_Strict):
    """Exactly one of `steps` (optimizer steps) and `epochs` must be given."""

    learning_rate: float | None = Field(
        None, gt=0, description="the method's own default without it"
    )
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    micro_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.06, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: bool = False
    offload_activations: bool = Field(
        False, description="keep what backward needs in the memory of the host"
    )
    group_by_length: bool = True
    eval_every: int | None = Field(None, ge=1, description="steps between validation losses")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many validations without improvement"
    )
    save_every: int | None = Field(None, ge=1, description="steps between resumable states")
    stop: Annotated[StopConfig | None, BeforeValidator(_stop_switch)] = Field(
        None, description="stop hopeless jobs early"
    )
    log_every: int = Field(1, ge=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)


class DpoConfig(_Strict):
    """Preference training: rows are pairs of a chosen and a rejected answer (see `train/preference.py`)."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0, description="how hard the policy is held to the reference")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs that are taken to be the wrong way round"
    )
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    reference: str = Field("base", min_length=1, description="base, or the folder of an adapter")
    start: Literal["fresh", "reference"] = Field(
        "fresh", description="begin as a new adapter, or as a copy of the reference"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_type == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing is defined for loss_type: sigmoid only; set it to 0")
        if self.start == "reference" and self.reference == "base":
            raise ValueError("start: reference needs an adapter's folder as the reference")
        return self


def _fine_tuning_is_none(value: Any) -> Any:
    """`objective: {name: sft}` says what no objective says."""
    return None if value == {"name": "sft"} else value


Objective = Annotated[DpoConfig | None, BeforeValidator(_fine_tuning_is_none)]


class MethodSpec(BaseModel):
    """`name` and the fields of that method's config."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def fields(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class JobPatch(_Strict):
    """What one job changes over the top level."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also its folder name")
    method: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    objective: dict[str, Any] | None = None
    seed: int | None = None
    priority: int = Field(0, description="of jobs that are trained together, higher ones go first")
    out: str | None = Field(None, description="folder that the trained adapter is copied to")


# Which schedulers read a key of `joint`; another one would pass over it in silence.
READ_BY = {
    "round_tokens": ("round_robin", "budget"),
    "objective": ("budget",),
    "priorities": ("budget",),
    "patience": ("budget",),
    "concurrency": ("fifo", "priority", "minpad", "adaptive"),
    "q": ("adaptive",),
}


class JointConfig(_Strict):
    """Jobs share model calls instead of taking turns; `joint: true` takes the defaults."""

    max_tokens: int = Field(4096, ge=1, description="of one model call, padding included")
    round_tokens: int | None = Field(
        None, ge=1, description="of one round; without it every job steps in every round"
    )
    stay: bool = Field(False, description="wait for further jobs when all have ended")
    memory: str | int | None = Field(
        None, description="limit above the loaded base, such as 6GiB; measured: predict, no limit"
    )
    scheduler: Literal["round_robin", "fifo", "priority", "minpad", "adaptive", "budget"] = Field(
        "round_robin", description="who takes part in a round"
    )
    objective: Literal["throughput", "turnaround", "fair"] = Field(
        "fair", description="what the scheduler budget is for"
    )
    priorities: Literal["strict", "weighted"] = Field(
        "strict", description="of budget: lower ones wait, or count for less"
    )
    patience: int = Field(
        16, ge=1, description="of budget: rounds after which a waiting job takes a step beside"
    )
    concurrency: int = Field(
        2, ge=1, description="of fifo, priority, minpad and adaptive: jobs of a round"
    )
    q: float = Field(
        0.5, ge=0, le=1, description="of adaptive: share of the queue that is looked at"
    )

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, value: str | int | None) -> str | int | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        for key, names in READ_BY.items():
            is_default = getattr(self, key) == type(self).model_fields[key].default
            if self.scheduler not in names and not is_default:
                raise ValueError(
                    f"{key} is not for scheduler: {self.scheduler}; leave it out, or set scheduler to "
                    f"{' or '.join(names)}"
                )
        return self


class JobRecipe(_Strict):
    """One job with every default filled in."""

    name: str
    base: str
    dtype: Literal["bfloat16", "float32"]
    seed: int
    threads: int | None
    method: MethodSpec
    data: DataConfig
    training: TrainingConfig
    objective: Objective = None
    priority: int = 0
    out: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.training.steps is None) == (self.training.epochs is None):
            raise ValueError("training: give exactly one of steps and epochs")
        if not self.data.train:
            raise ValueError("data.train: needs at least one source, e.g. [{path: train.jsonl}]")
        if self.training.early_stopping_patience and not self.data.validation:
            raise ValueError("training.early_stopping_patience: needs data.validation")
        if self.training.eval_every and not self.data.validation:
            raise ValueError("training.eval_every: needs data.validation")
        if self.objective is not None and self.data.packing:
            raise ValueError("data.packing: pairs are not packed; set it to false")
        if self.objective is not None and isinstance(self.data.template, TextTemplate):
            raise ValueError(
                "data.template: the texts of preference rows are taken as they are; use task or chat"
            )
        return self


class Recipe(_Strict):
    """The whole file. `base` is a name that `loramux fetch` knows, a local folder or a hub id."""

    base: str = Field(min_length=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="torch threads; null leaves them alone")
    method: MethodSpec | None = None
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    objective: Objective = None
    jobs: tuple[JobPatch, ...] | None = None
    joint: JointConfig | None = None

    @field_validator("joint", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return ({} if value else None) if isinstance(value, bool) else value

    def jobs_resolved(self) -> list[JobRecipe]:
        """One complete job per entry of `jobs`; without that list, the one job "default"."""
        from loramux.recipe.resolve import resolve_jobs

        return resolve_jobs(self)
