"""`lower_adapter`: a saved adapter as one plain PEFT folder that any tool loads, where that is possible.

static       the tensors themselves, bit for bit
per_request  what the routers decide for one prompt, or for one task: the chosen experts' rows, one after the other,
             with their weights folded in. It does the same as the mixture for that prompt and what is generated
             after it
per_token    refused: which experts act changes from token to token, so no fixed weights do the same

Letters: Q requests (here 1), K chosen experts, E experts of a site, R rank rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loramux.compose.sources import fp32
from loramux.compose.write import check_out, plain_adapter, versions, write_folder
from loramux.errors import LoramuxError, suggest
from loramux.formats.jsonio import read_json_object
from loramux.formats.peft import read_peft
from loramux.formats.tensors import AdapterTensors, SiteTensors
from loramux.persist.base import RECORD, base_record

if TYPE_CHECKING:
    from loramux.core.adapter import Adapter
    from loramux.core.state import State
    from loramux.core.types import Site

PROVENANCE = "lower.json"
FORMATS = ("peft",)


def lower_adapter(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    to: str = "peft",
    base: Any = None,
    prompt: str | None = None,
    template: Any = None,
    task: str | None = None,
    force: bool = False,
    check_base: bool = True,
) -> dict[str, Any]:
    """Write `adapter` as one plain PEFT adapter to `out`; returns what `lower.json` there holds, and `out`.

    A mixture that decides per request needs its base and a prompt (as it is, unless a template is named) or, where its
    router looks up tasks, a task. Raises LoramuxError where no plain adapter does the same, and for a wrong base.
    """
    if to not in FORMATS:
        raise LoramuxError(f"cannot lower to {to!r}; {suggest(to, FORMATS)}")
    source = Path(adapter)
    if not source.is_dir():
        raise LoramuxError(
            f"no adapter folder at {str(adapter)!r}; give the folder of a saved adapter"
        )
    folder = check_out(out, force, [source])
    if _is_plain(source):
        if prompt is not None or task is not None or template is not None:
            raise LoramuxError(
                f"{adapter} is static: it does the same for every prompt and task; leave out prompt, task and template"
            )
        return _copy(source, folder)
    if base is None:
        raise LoramuxError(f"{adapter} is a mixture: its routers run on the base; give --base")
    return _materialise(source, folder, base, prompt, template, task, check_base)


def _is_plain(source: Path) -> bool:
    from loramux.persist.read import is_plain

    return is_plain(source)


def _copy(source: Path, folder: Path) -> dict[str, Any]:
    tensors = read_peft(source)
    noted = source / RECORD
    record = read_json_object(noted) if noted.is_file() else None
    facts = _facts(source, "static", tensors, {"digest": tensors.digest})
    write_folder(folder, tensors, record, facts, PROVENANCE)
    return {"out": str(folder), **facts}


def _facts(
    source: Path, servability: str, tensors: AdapterTensors, more: Mapping[str, Any]
) -> dict[str, Any]:
    ranks = [site.rank for site in tensors.sites.values()]
    return {
        "schema_version": 1,
        "to": "peft",
        "adapter": str(source),
        "servability": servability,
        "rank": {"min": min(ranks), "max": max(ranks), "mean": sum(ranks) / len(ranks)},
        "sites": len(ranks),
        **more,
        "versions": versions(),
    }


# --- A mixture that decides per request -----------------------------------------------------------


def _materialise(
    source: Path,
    folder: Path,
    base: Any,
    prompt: str | None,
    template: Any,
    task: str | None,
    check_base: bool,
) -> dict[str, Any]:
    import loramux
    from loramux.eval.loading import Loaded, load_model

    loaded = base if isinstance(base, Loaded) else load_model(base)
    handle = loramux.load(loaded.model, source, check_base=check_base)
    try:
        (adapter,) = handle.adapters.values()
        _refuse_per_token(adapter, source)
        state = _decide(handle, loaded, adapter, prompt, template, task)
        sites = {
            path: site
            for path in adapter.rows
            if (site := _folded(state, adapter, adapter.sites[path])) is not None
        }
        if not sites:
            raise LoramuxError("no expert acts for this prompt: the bare base does the same")
        transposed = any(adapter.sites[path].transposed for path in sites)
        servability = adapter.method.servability
        method = adapter.method.name
    finally:
        handle.detach()
    tensors = plain_adapter(
        sites,
        base_name=getattr(loaded.model, "name_or_path", "") or None,
        fan_in_fan_out=transposed,
        use_dora=any(site.magnitude is not None for site in sites.values()),
    )
    facts = _facts(
        source,
        servability,
        tensors,
        {"method": method, "prompt": prompt, "template": template, "task": task},
    )
    write_folder(folder, tensors, _record(loaded.model, list(sites)), facts, PROVENANCE)
    return {"out": str(folder), **facts}


def _refuse_per_token(adapter: Adapter, source: Path) -> None:
    if adapter.method.servability == "per_token":
        raise LoramuxError(
            f"{source} holds {adapter.method.title}, which routes every token anew: no fixed weights do the same, so "
            "it cannot be a plain adapter; serve the mixture itself with loramux, or merge its experts with `loramux "
            "compose`, which is another model"
        )


@torch.no_grad()
def _decide(
    handle: Any, loaded: Any, adapter: Adapter, prompt: str | None, template: Any, task: str | None
) -> State:
    """Run the prompt once; the state knows every route afterwards."""
    from loramux.eval.encode import encode_text

    # A router that looks up tasks reads no token: any prompt does.
    reads_prompt = any(getattr(router, "needs_prompt", True) for router in adapter.routers.values())
    if prompt is None and (reads_prompt or task is None):
        what = "a prompt" if reads_prompt else "a task"
        raise LoramuxError(
            f"{adapter.method.title} decides per request: which experts act depends on {what}; give --prompt TEXT"
            + ("" if reads_prompt else " or --task NAME")
        )
    if prompt is None:
        ids = [_any_token(loaded.tokenizer)]
    else:
        ids = encode_text(prompt, loaded.tokenizer, template)
    tokens = torch.tensor([ids], device=next(loaded.model.parameters()).device)
    with handle.batch(tasks=[task]) if task is not None else handle.batch():
        loaded.model(input_ids=tokens, use_cache=False)
    state: State = handle.dispatch.last
    return state


def _any_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _folded(state: State, adapter: Adapter, site: Site) -> SiteTensors | None:
    """The rows that act at a site for the one request, weights and scales folded into A; None where none does."""
    rows = adapter.rows[site.path].folded()
    weight_E = slot_weights(state, adapter, site)
    active = [
        slot
        for slot, weight in enumerate(weight_E.tolist())
        if weight != 0 and rows.spans.rank[slot]
    ]
    if not active:
        return None
    if rows.magnitude is not None:
        return _folded_dora(rows, site, active, weight_E)
    a_parts, b_parts = [], []
    for slot in active:
        at = rows.slot_rows(slot)
        a_parts.append(
            rows.a.detach()[at].double() * (float(weight_E[slot]) * rows.spans.scale[slot])
        )
        b_parts.append(rows.b.detach()[at])
    return SiteTensors(fp32(torch.cat(a_parts)), fp32(torch.cat(b_parts)))


def _folded_dora(rows: Any, site: Site, active: list[int], weight_E: Tensor) -> SiteTensors:
    """One DoRA expert with weight 1 is a DoRA adapter; anything else is no sum of ranks."""
    if len(active) > 1 or float(weight_E[active[0]]) != 1.0:
        raise LoramuxError(
            f"{site.path} weighs DoRA experts with {[float(weight_E[slot]) for slot in active]}: their sum is neither "
            "one LoRA nor one DoRA, so this mixture cannot be lowered"
        )
    (slot,) = active
    at = rows.slot_rows(slot)
    a_RI = rows.a.detach()[at].double() * rows.spans.scale[slot]
    return SiteTensors(fp32(a_RI), fp32(rows.b.detach()[at]), fp32(rows.magnitude.detach()[slot]))


def slot_weights(state: State, adapter: Adapter, site: Site) -> Tensor:
    """fp64 [E]: what the routes of the first request make of every expert of a site."""
    num = adapter.rows[site.path].spans.num_slots
    unit = adapter.method.unit_of(site)
    route = state.route(adapter, site) if unit is None else state.routes[adapter.name, unit]
    if route.combine == "rows":
        raise LoramuxError(
            f"{adapter.method.title} runs an FFN once per expert, which no plain adapter can; it cannot be lowered"
        )
    if not route.per_request and not (route.slot is None and route.weight is None):
        raise LoramuxError(
            f"{adapter.method.title} routes {site.path} per token; it cannot be a plain adapter"
        )
    weight_E = torch.ones(num, dtype=torch.float64)
    if route.slot is not None:
        slot_K = route.slot[0].cpu()
        given_K = torch.ones(len(slot_K)) if route.weight is None else route.weight[0].cpu()
        keep_K = slot_K >= 0
        weight_E = torch.zeros(num, dtype=torch.float64)
        weight_E.index_add_(0, slot_K[keep_K], given_K[keep_K].double())
    elif route.weight is not None:
        weight_E = route.weight[0].cpu().double()
    if route.gate is not None and site.path in route.column:
        weight_E = weight_E * float(route.gate[0, route.column[site.path]])
    return weight_E


def _record(model: Any, paths: list[str]) -> dict[str, Any]:
    from loramux.persist.base import BaseIdentity

    identity = BaseIdentity(model)
    name = getattr(model, "name_or_path", "") or ""
    return base_record(name, identity.sample(paths), identity.marks(paths))


__all__ = ["PROVENANCE", "lower_adapter", "slot_weights"]
