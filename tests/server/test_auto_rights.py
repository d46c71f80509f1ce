"""`auto` and rights: however prompts, shares and adapters change, nothing foreign is chosen, shown, or counted.

LORAMUX_AUTO_CALLS=100000 (`make fuzz`) tries as many as a release does.
"""

import asyncio
import os
import random

import pytest

from loramux.retrieval import Retriever, make_profile
from loramux.server.choosing import choose
from loramux.server.errors import ApiError
from loramux.server.stub import StubRegistry
from loramux.tenancy.caller import SCOPES, Caller
from retrieval.pools import TOPICS, samples
from server.rig import client, config, stub_services

CALLS = int(os.environ.get("LORAMUX_AUTO_CALLS", "1500"))
TENANTS = ("ann", "bob", "cyd", "dee")
WORDS = " ".join(TOPICS.values()).split()


def test_auto_never_chooses_shows_or_mixes_a_foreign_adapter():
    registry, retriever = StubRegistry(), Retriever()
    profiles = {topic: make_profile(samples(topic)) for topic in TOPICS}
    draw = random.Random(11)
    num = 0

    def publish() -> None:
        nonlocal num
        num += 1
        tenant, topic = draw.choice(TENANTS), draw.choice(list(TOPICS))
        visibility = "shared" if draw.random() < 0.1 else "private"
        made = registry.add(tenant, f"{topic}-{num}", visibility=visibility)
        # Some marks are wrong, as an index that lags behind has them: the registry has the last word.
        shown = visibility == "shared" or draw.random() < 0.1
        tags = {"readers": ("*",) if shown else ()}
        retriever.upsert(made.ref, profiles[topic], owner=tenant, tags=tags)

    for _ in range(60):
        publish()
    services = stub_services(registry=registry, retriever=retriever)
    client(services)  # makes the names
    modes = [
        config(retrieval={"mode": mode, "threshold": None}) for mode in ("selection", "mixture")
    ]
    callers = [Caller(tenant, "k", SCOPES) for tenant in (*TENANTS, "nobody")]
    num_chosen = num_refused = 0

    async def main() -> None:
        nonlocal num_chosen, num_refused
        for i in range(CALLS):
            if i % 500 == 499:
                publish()
                services.names.forget()
            caller = draw.choice(callers)
            asked = " ".join(draw.sample(WORDS, 5))
            if i % 10 == 0:  # by name as well, whoever's it is
                target = draw.choice(list(registry.kept.values()))[-1]
                may = target.tenant == caller.tenant or target.visibility == "shared"
                asked_for = choose(
                    services, modes[0], f"{target.tenant}/{target.name}", asked, caller
                )
                if may:
                    assert (await asked_for).versions == (target,)
                else:
                    with pytest.raises(ApiError) as error:
                        await asked_for
                    assert error.value.code == "model_not_found"
                    num_refused += 1
            plan = await choose(services, draw.choice(modes), "auto", asked, caller)
            routing = plan.routing
            shown = {hit["ref"] for hit in (*routing["chosen"], *routing["runners_up"])}
            shown |= {version.ref for version in plan.versions}
            num_chosen += bool(plan.versions)
            for ref in shown:
                tenant, _, name = ref.partition("@")[0].partition("/")
                version = registry.kept[f"{tenant}/{name}"][-1]
                assert version.tenant == caller.tenant or version.visibility == "shared", ref

    asyncio.run(main())
    assert num_chosen > CALLS * 0.9 and num_refused > CALLS * 0.02
