"""Which adapters answer a call: names under the caller's rights, mixtures by `router:`, and `auto` from the prompt.

Why rights come first: the retriever is told what it may return before it ranks, so no score of a foreign adapter can
show, and none can be chosen. It is told by a condition and not by a list: with 10,000 adapters, making the list anew
after each change of the registry took most of a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError
from loramux.server.config import RetrievalConfig, ServerConfig
from loramux.server.errors import ApiError
from loramux.server.resolve import Choice, Plan, parse_model, unknown_model
from loramux.server.services import Services

if TYPE_CHECKING:
    from loramux.retrieval import Where

log = logging.getLogger(__name__)
MAX_LOOKS = 8  # at a registry that changes all the time
RAMOLE = "ramole"  # `router:ramole`: the trained router over adapters that fit the prompt


async def choose(
    services: Services, config: ServerConfig, model: str, asked: str | None, caller: Any
) -> Plan:
    """The plan of a call. `asked` is what retrieval reads, None where there are several prompts; ApiError
    model_not_found for what may not be used."""
    choice = parse_model(model, config.name, config.limits.max_mix)
    if choice.kind == "base":
        return Plan(config.name)
    if services.registry is None:
        raise unknown_model(model)
    if choice.kind == "auto":
        return await _auto(services, config, asked, caller)
    if choice.kind == "router":
        return await _router(services, config, choice.parts[0][0], asked, caller)
    return await _mix(services, choice, caller)


async def _mix(services: Services, choice: Choice, caller: Any) -> Plan:
    versions = [await version_of(services, name, caller) for name, _ in choice.parts]
    weights = [weight for _, weight in choice.parts]
    return plan_of(versions, weights)


def plan_of(versions: list[Any], weights: list[float], **more: Any) -> Plan:
    """A plan from versions and weights; one content may be named once."""
    digests = [version.digest for version in versions]
    if len(set(digests)) < len(digests):
        raise ApiError(
            "the mix names the same adapter twice; add the weights",
            code="invalid_model",
            param="model",
        )
    is_one = len(versions) == 1 and weights[0] == 1.0
    label = "+".join(
        version.ref if is_one else f"{version.ref}*{weight:g}"
        for version, weight in zip(versions, weights, strict=True)
    )
    return Plan(label, tuple(zip(digests, weights, strict=True)), tuple(versions), **more)


async def version_of(services: Services, name: str, caller: Any) -> Any:
    """A version that this caller may use, made for this base."""
    version = await services.names.version(name, caller)
    base = services.base_digest
    if base is not None and version.base_digest not in (None, base):
        raise ApiError(
            f"{version.ref} was made for another base model than this server's",
            code="wrong_base", param="model",
        )  # fmt: skip
    return version


async def _router(
    services: Services, config: ServerConfig, name: str, asked: str | None, caller: Any
) -> Plan:
    if name == RAMOLE and RAMOLE in services.extras:
        plan: Plan = await services.extras[RAMOLE](services, config, asked, caller)
        return plan
    version = await version_of(services, name, caller)
    if version.servability == "static":
        raise ApiError(
            f"{version.ref} routes nothing: it is a plain adapter; use it by name, or name a mixture",
            code="not_a_router", param="model",
        )  # fmt: skip
    return plan_of([version], [1.0], router=version.ref)


# --- auto -------------------------------------------------------------------------------------------


async def _auto(services: Services, config: ServerConfig, asked: str | None, caller: Any) -> Plan:
    """The best of what the caller may use, or the base where nothing fits."""
    found, allowed = await retrieve(services, config.retrieval, asked, caller)
    chosen = {} if found.abstained else _weights(services, config.retrieval, found)
    routing = describe(found, chosen, allowed)
    if not chosen:
        return Plan(config.name, retrieved=found, routing=routing)
    # Two names may hold one content: an adapter of one's own and a shared copy. It counts once, with both weights.
    versions: dict[str, Any] = {}
    weights: dict[str, float] = {}
    for key, weight in chosen.items():
        version = versions.setdefault(allowed[key].digest, allowed[key])
        weights[version.digest] = weights.get(version.digest, 0.0) + weight
    return plan_of(
        list(versions.values()), list(weights.values()), retrieved=found, routing=routing
    )


async def retrieve(
    services: Services, config: RetrievalConfig, asked: str | None, caller: Any
) -> tuple[Any, Mapping[str, Any]]:
    """(what fits the prompt, {id of the retriever: Version} of the hits)."""
    retriever = services.retriever
    if retriever is None:
        raise ApiError(
            "this server has no retrieval; name an adapter", code="no_retrieval", param="model"
        )
    if asked is None:
        raise ApiError(
            "the adapter is chosen by the prompt, and there are several; send each in a call of its own",
            code="invalid_value",
            param="prompt",
        )
    if not asked.strip():
        raise ApiError(
            "'auto' reads the last user message, and it is empty",
            code="invalid_value",
            param="messages",
        )
    names, where = services.names, may_use(caller, services.base_digest, config.trusted_tenants)
    refused: frozenset[str] = frozenset()
    for _ in range(MAX_LOOKS):
        epoch = await names.current()
        try:
            found = await asyncio.to_thread(
                retriever.retrieve, asked, config.k, allowed=where, masked=refused
            )
        except LoramuxError as error:
            raise ApiError(
                f"retrieval failed: {error}", code="retrieval_failed", status=500
            ) from None
        # The second lock on the same door: the registry has the last word about every hit.
        allowed = {hit.id: await _usable(services, hit.id, caller) for hit in found.hits}
        if names.epoch != epoch:
            continue  # an alias moved meanwhile, or a right: hits and versions may be of two states
        strangers = {key for key, version in allowed.items() if version is None}
        if not strangers:
            return found, allowed
        refused |= strangers
    raise ApiError(
        "the registry changes too fast to choose from; try again",
        code="overloaded",
        headers={"Retry-After": "1"},
    )


def may_use(caller: Any, base: str | None, trusted: tuple[str, ...] | None) -> Where:
    """What `auto` may choose from, as a condition of the search. trusted: whose shared adapters count, None: all."""
    from loramux.retrieval import Where

    where = Where.visible_to(caller.tenant, base)
    if trusted is None:
        return where
    owners = tuple(("owner", tenant) for tenant in (caller.tenant, *trusted))
    return Where((*where.clauses, owners))


async def _usable(services: Services, ref: str, caller: Any) -> Any:
    """The version of a hit, None if the caller may not use it with this base."""
    try:
        return await version_of(services, ref, caller)
    except ApiError as error:
        if error.code not in ("model_not_found", "wrong_base"):
            raise
        log.warning("%s is found by retrieval, and the registry refuses it", ref)
        return None


def _weights(services: Services, config: RetrievalConfig, found: Any) -> dict[str, float]:
    from loramux.retrieval import weights

    return {key: float(value) for key, value in weights(found, mode=config.mode).items() if value}


def describe(found: Any, chosen: Mapping[str, float], allowed: Mapping[str, Any]) -> dict[str, Any]:
    """What a reply says about the choice: scores of the chosen and of the runners-up."""
    hits = [
        {
            "ref": allowed[hit.id].ref,
            "score": _number(hit.score),
            "lexical": _number(hit.lexical),
            "dense": _number(hit.dense),
        }
        for hit in found.hits
    ]
    refs = {allowed[key].ref for key in chosen}
    return {
        "mode": "auto",
        "abstained": not chosen,
        "reason": found.reason,
        "chosen": [hit for hit in hits if hit["ref"] in refs],
        "runners_up": [hit for hit in hits if hit["ref"] not in refs],
    }


def _number(value: Any) -> float | None:
    """Six digits are enough for people, and the same in every JSON; NaN is not JSON."""
    return None if value is None or value != value else round(float(value), 6)
