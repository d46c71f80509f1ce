"""Profiles made to attract every prompt, and shares of tenants that nobody trusts."""

import asyncio

from loramux.bench.retrieval_attack import measure
from loramux.retrieval import Retriever, make_profile
from loramux.server.choosing import choose
from loramux.server.stub import StubRegistry
from loramux.tenancy.caller import SCOPES, Caller
from retrieval.pools import TOPICS, WordEncoder, samples
from server.rig import client, config, stub_services


def test_fifty_hostile_profiles_together_stay_below_their_fair_share():
    """The figures over 33 tasks with MiniLM: `python -m loramux.bench.retrieval_attack`."""
    known = {topic: samples(topic, 40) for topic in TOPICS}
    sent = {topic: samples(topic, 20, seed=9) for topic in TOPICS}
    for encoder in (None, WordEncoder()):
        found = measure(known, sent, encoder)
        assert found["hostile"] + sum(found["refused"].values()) == 50
        assert found["all_together_of_their_fair_shares"] <= 1.0
        assert found["share_of_traffic"] < 0.5


def test_auto_leaves_out_what_is_shared_by_tenants_that_are_not_trusted():
    registry, retriever = StubRegistry(), Retriever()
    for tenant in ("ann", "good", "mallory"):
        made = registry.add(tenant, "chess", visibility="private" if tenant == "ann" else "shared")
        tags = {"readers": () if tenant == "ann" else ("*",)}
        retriever.upsert(made.ref, make_profile(samples("chess")), owner=tenant, tags=tags)
    services = stub_services(registry=registry, retriever=retriever)
    client(services)  # makes the names

    def shown(trusted):
        told = config(retrieval={"trusted_tenants": trusted, "threshold": None})
        caller = Caller("ann", "k", SCOPES)
        plan = asyncio.run(choose(services, told, "auto", samples("chess")[0], caller))
        hits = (*plan.routing["chosen"], *plan.routing["runners_up"])
        return {hit["ref"].split("/")[0] for hit in hits}

    assert shown(None) == {"ann", "good", "mallory"}
    assert shown(["good"]) == {"ann", "good"}
    assert shown([]) == {"ann"}
    # By its name a shared adapter is still anybody's to use: whoever writes the name trusts it.
    asked = choose(services, config(), "mallory/chess", "x", Caller("ann", "k", SCOPES))
    assert asyncio.run(asked).label == "mallory/chess@1"
