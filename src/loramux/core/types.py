"""The nouns everyone shares: where experts sit (`Site`) and who acts on which token (`Route`).

Letters: N tokens (rows of the flattened batch), Q requests, K experts chosen per token, E experts of a site,
C sites of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor

Role = Literal["plain", "enter", "exit"]
When = Literal["static", "prompt", "token"]
Servability = Literal["static", "per_request", "per_token"]


@dataclass(frozen=True)
class Site:
    """One linear of the model that can hold experts.

    `path` is the module path in the model, `name` the path inside its layer, `block` the path of the module that
    holds it (attention or FFN). In an FFN the first linears have the role `enter`, the last one `exit`: between them
    a token may be several rows, one per chosen expert.
    """

    path: str
    name: str
    layer: int
    layer_path: str
    block: str
    kind: Literal["attention", "ffn", "other"]
    role: Role
    d_in: int
    d_out: int
    d_model: int  # width of the residual stream, what the layer and its blocks read
    transposed: bool = False  # Conv1D keeps its weight as [d_in, d_out]


@dataclass(frozen=True)
class Expert:
    """What a method asks to have allocated at a site: `rank` rows, scaled with `scale`."""

    rank: int
    scale: float


@dataclass(frozen=True, eq=False)
class Route:
    """Who acts on which token. The only thing a router returns.

    slot    [N, K] int64 or None: the experts a token uses; None means every expert of the site, in order
    weight  [N, K] fp32 or None: their weights; None means 1
    gate    [Q, C] fp32 or None: one factor per request and site of the layer; `column` names each site's column
    combine "sum": the deltas are added up; "rows": an FFN token becomes one row per chosen expert and the rows are
            summed with `weight` behind the exit linear
    per_request  slot and weight have one row per request, [Q, K], instead of one per token
    sums_to_one  with combine = "rows": a token's weights sum to 1, so the exit's bias counts once
    """

    slot: Tensor | None = None
    weight: Tensor | None = None
    gate: Tensor | None = None
    column: Mapping[str, int] = field(default_factory=dict)
    combine: Literal["sum", "rows"] = "sum"
    per_request: bool = False
    sums_to_one: bool = True


EVERYTHING = Route()


@dataclass(frozen=True, eq=False)
class RouteRecord:
    """What one router decided in the last forward pass, for losses, reports and tests.

    weight [n, K] (n = requests for prompt routers, tokens for token routers) belongs to the columns in slot [n, K];
    without slot, to all columns in order. probs [n, columns] are the router's probabilities before selection, logits
    what they came from; valid [n] marks real requests or tokens. `columns` names what is chosen among: sites
    (`self_attn.q_proj`) or experts (`0`, `1`, ...). request [n] is the request of each token, tasks[q] the task of
    request q, where a loss wants them.
    """

    adapter: str
    path: str
    layer: int
    when: When
    columns: tuple[str, ...]
    weight: Tensor
    slot: Tensor | None = None
    probs: Tensor | None = None
    logits: Tensor | None = None
    valid: Tensor | None = None
    request: Tensor | None = None
    tasks: tuple[str | None, ...] | None = None

    @cached_property
    def gates(self) -> Tensor:
        """The weights used, [n, columns]; 0 where a column was not chosen."""
        if self.slot is None:
            return self.weight
        weight = self.weight.masked_fill(self.slot < 0, 0.0)
        empty = weight.new_zeros(weight.shape[0], len(self.columns))
        return empty.scatter_add(1, self.slot.clamp_min(0), weight)
