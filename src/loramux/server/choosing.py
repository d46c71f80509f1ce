"""Which adapters answer a call: names under the caller's rights, mixtures by `router:`, and `auto` from the prompt.

Why rights come first: the retriever is told what it may return before it ranks, so no score of a foreign adapter can
show, and none can be chosen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from loramux.errors import LoramuxError
from loramux.server.config import RetrievalConfig, ServerConfig
from loramux.server.errors import ApiError
from loramux.server.resolve import Choice, Plan, parse_model, unknown_model
from loramux.server.services import Services

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
    """(what fits the prompt, {id of the retriever: Version} of all the caller may use)."""
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
    names = services.names
    for _ in range(MAX_LOOKS):
        epoch = names.epoch
        visible = await names.visible(caller, services.base_digest, config.trusted_tenants)
        if names.epoch != epoch:
            continue
        try:
            found = await asyncio.to_thread(
                retriever.retrieve, asked, config.k, allowed=visible.refs
            )
        except LoramuxError as error:
            raise ApiError(
                f"retrieval failed: {error}", code="retrieval_failed", status=500
            ) from None
        # Else an alias moved meanwhile: the retriever knew the new version and `visible` the old one, so that the
        # adapter would be missed.
        if names.epoch == epoch:
            break
    else:
        raise ApiError(
            "the registry changes too fast to choose from; try again",
            code="overloaded",
            headers={"Retry-After": "1"},
        )
    allowed = visible.by_ref
    strangers = [hit.id for hit in found.hits if hit.id not in allowed]
    if strangers:  # the retriever was told; this is the second lock on the same door
        raise AssertionError("the retriever returned an adapter that the caller may not use")
    return found, allowed


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
