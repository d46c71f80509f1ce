"""MOELoRA: a LoRA of rank r split into N experts of rank r/N at every linear, weighed by the task of the sample.

Liu et al., When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications, SIGIR 2024,
arXiv 2310.18339 (there first called MOELoRA). With an embedding e_t [64] of task t and W_g [N, 64] at each linear:

    w = softmax(W_g e_t)                                  one vector per task, the same for all tokens of a sample
    y = W0 x + (alpha / r) sum_i w_i B_i^T A_i x          r is the total rank

So every task has one increment of rank r that can be merged: `MOELoRAMethod.expert_weights`.

Letters: Q requests, E experts, T tasks, M width of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loramux.core.bank import Rows
from loramux.core.method import Method, MethodConfig
from loramux.core.mixing import gate_start, refuse_dora
from loramux.core.router import Router, RouteView
from loramux.core.types import Expert, Route, Site
from loramux.core.values import check_whole

START_STD = 0.01  # of A
UNKNOWN = -1


@dataclass(frozen=True, kw_only=True)
class MOELoRAConfig(MethodConfig):
    """Defaults are the released code's: r 16 over 8 experts, alpha 32, dropout 0.1, embeddings of width 64.

    tasks: the names that rows and requests use, in the order of the embeddings. fallback: what a request of another
    task or of none gets: "error"; "uniform", every expert with 1/N; "mean", the weights of the mean embedding.
    """

    method = "moelora"

    r: int = 16
    lora_dropout: float = 0.1
    num_experts: int = 8
    tasks: tuple[str, ...] = ()
    task_embedding_dim: int = 64
    fallback: Literal["error", "uniform", "mean"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_dora(self)
        if isinstance(self.tasks, list):
            object.__setattr__(self, "tasks", tuple(self.tasks))
        names = self.tasks
        if not isinstance(names, tuple) or not all(isinstance(n, str) and n for n in names):
            raise ValueError(f"tasks must be a list of names, got {names!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"tasks must differ, got {list(names)}")
        check_whole("num_experts", self.num_experts)
        check_whole("task_embedding_dim", self.task_embedding_dim)

    def default_alpha(self) -> float:
        return 32.0

    def place(self, task: str | None) -> int:
        """Place of a task's embedding; -1 for a task it does not know, where that is allowed."""
        if task in self.tasks:
            return self.tasks.index(task)
        if self.fallback != "error":
            return UNKNOWN
        given = "no task was named" if task is None else f"{task!r} is none of them"
        raise ValueError(
            f"this adapter weighs its experts by the task, one of {list(self.tasks)}, and {given}; pass tasks=[...] "
            "(one per request), or train it with fallback='mean' or 'uniform'"
        )


class TaskGate(Router):
    """One per linear: looks up the tasks of the requests, and at no token.

    It decides when the prompt comes and is kept with its KV cache, so an answer needs to name its task only once.
    """

    scope: ClassVar[Literal["layer", "block", "site"]] = "site"
    when = "prompt"
    needs_prompt = False

    def __init__(self, config: MOELoRAConfig):
        super().__init__()
        self.config = config
        self.names = tuple(str(e) for e in range(config.num_experts))
        width = config.task_embedding_dim
        self.embedding = nn.Parameter(torch.randn(len(config.tasks), width))
        self.weight = nn.Parameter(gate_start(config.num_experts, width, None))

    def forward(self, view: RouteView, incoming: Route) -> Route:
        wide = torch.float64 if view.x_ND.dtype == torch.float64 else torch.float32
        owned_Q = torch.zeros(view.num_requests, dtype=torch.bool, device=view.request_N.device)
        owned_Q[view.request_N[view.valid_N]] = True
        place_Q = self._places(view.tasks, owned_Q)
        weight_QE = self.table(wide)[place_Q]  # -1, unknown, is the last row
        view.record(columns=self.names, weight=weight_QE, probs=weight_QE, valid=owned_Q)
        return Route(weight=weight_QE, per_request=True)

    def table(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T + 1, E]: the experts' weights for every task, and behind them for a task it does not know."""
        embedding_TM = self.embedding.to(dtype)
        if self.config.fallback == "mean":
            other_1M = embedding_TM.mean(0, keepdim=True)
        else:
            other_1M = torch.zeros_like(embedding_TM[:1])  # logits 0: 1/N each
        return (torch.cat([embedding_TM, other_1M]) @ self.weight.to(dtype).T).softmax(-1)

    def _places(self, tasks: tuple[str | None, ...] | None, owned_Q: Tensor) -> Tensor:
        """Row of each request's task, -1 for an unknown one and for requests of others."""
        places = [
            self.config.place(None if tasks is None else tasks[q]) if own else UNKNOWN
            for q, own in enumerate(owned_Q.tolist())
        ]
        return torch.tensor(places, dtype=torch.long, device=owned_Q.device)


class MOELoRAMethod(Method):
    name = "moelora"
    title = "MOELoRA"
    paper = "arXiv 2310.18339"
    granularity = "expert at a linear"
    routing_unit = "task"
    servability = "per_request"
    config_class = MOELoRAConfig
    default_learning_rate = 2e-4
    config: MOELoRAConfig

    def check_sites(self, sites: Sequence[Site]) -> None:
        if not self.config.tasks:
            raise ValueError(
                "MOELoRA weighs its experts by the task: list the names of the tasks in `tasks`"
            )
        num = self.config.num_experts
        for site in sites:
            rank = self.config.rank_at(site.path)
            if rank % num:
                raise ValueError(
                    f"num_experts must divide the rank: {num} experts do not share rank {rank} of {site.path}"
                )

    def experts(self, site: Site) -> list[Expert]:
        config, num = self.config, self.config.num_experts
        rank = config.rank_at(site.path)
        return [Expert(rank // num, config.scale_at(site.path, rank))] * num

    def routers(self, sites: Sequence[Site]) -> dict[str, Router]:
        return {site.path: TaskGate(self.config) for site in sites}

    def start_rows(self, site: Site, rows: Rows) -> None:
        if self.config.init_lora_weights is True:
            torch.nn.init.normal_(rows.a, std=START_STD)

    def check_task(self, task: str | None) -> None:
        self.config.place(task)

    @torch.no_grad()
    def expert_weights(self, routers: Mapping[str, Router], task: str) -> dict[str, Tensor]:
        """Linear -> weights [E] of its experts for one task: what merging the adapter for that task needs."""
        found = {}
        for path, router in routers.items():
            assert isinstance(router, TaskGate)
            found[path] = router.table()[self.config.place(task)]
        return found


METHOD = MOELoRAMethod
