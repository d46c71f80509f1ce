"""What `model` may say, under whose rights, and how soon a change is seen."""

import asyncio
import random
import threading
import traceback
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.retrieval import Retriever, make_profile
from loramux.server.choosing import choose
from loramux.server.errors import ApiError
from loramux.server.resolve import POLL_S, Choice, Names, parse_model
from loramux.server.stub import StubRegistry
from server.rig import client, config, error_of, stub_services

A = SimpleNamespace(tenant="a")
B = SimpleNamespace(tenant="b")
LOCAL_USER = SimpleNamespace(tenant="local")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("pico", Choice("base")),
        ("base", Choice("base")),
        ("auto", Choice("auto")),
        ("router:sup", Choice("router", (("sup", 1.0),))),
        ("law", Choice("mix", (("law", 1.0),))),
        ("pico:acme/law@2", Choice("mix", (("acme/law@2", 1.0),))),
        ("a*0.7+b/c@x*-0.3", Choice("mix", (("a", 0.7), ("b/c@x", -0.3)))),
        ("a + b*2e-1", Choice("mix", (("a", 1.0), ("b", 0.2)))),
    ],
)
def test_a_model_field_is_taken_apart(text, choice):
    assert parse_model(text, "pico") == choice


@pytest.mark.parametrize(
    "text", ["a*", "a*x", "a*nan", "a*inf", "a*0", "+a", "a+", "*1", "+".join("abcdefghi")]
)
def test_a_mix_that_is_none_is_refused(text):
    with pytest.raises(ApiError) as refused:
        parse_model(text, "pico")
    assert refused.value.code == "invalid_model"


def test_names_that_nobody_has_and_names_of_others_get_the_same_answer_and_the_same_work():
    registry = StubRegistry()
    registry.add("a", "law")
    services = stub_services(registry=registry)
    http = client(services)
    answers = []
    for name in ("a/law", "a/wal", "b/law"):
        before = registry.num_lookups
        response = http.post("/v1/completions", json={"model": name, "prompt": "x"})
        answers.append(response.text.replace(name, "NAME"))
        assert registry.num_lookups == before + 1
    assert len(set(answers)) == 1 and "model_not_found" in answers[0]


def test_a_name_is_looked_up_once_until_something_changes():
    registry = StubRegistry()
    registry.add("a", "law")
    now = [0.0]
    names = Names(registry, clock=lambda: now[0])

    async def main() -> None:
        for _ in range(5):
            assert (await names.version("law", A)).version == 1
        assert registry.num_lookups == 1
        registry.add("a", "law")  # by another process
        now[0] += POLL_S
        assert (await names.version("law", A)).version == 2
        registry.set_alias("a/law", "latest", 1)
        names.forget()  # by this process: at once
        assert (await names.version("law", A)).version == 1

    asyncio.run(main())


def test_a_lookup_that_a_change_overtakes_is_not_kept():
    registry = StubRegistry()
    registry.add("a", "law")
    names = Names(registry)
    quick = registry.resolve
    read, go_on = threading.Event(), threading.Event()

    def slow(ref: str, *, caller: str | None) -> Any:
        found = quick(ref, caller=caller)
        registry.resolve = quick  # type: ignore[method-assign]
        read.set()
        go_on.wait(5)
        return found

    registry.resolve = slow  # type: ignore[method-assign]

    async def main() -> None:
        overtaken = asyncio.ensure_future(names.version("law", A))
        await asyncio.to_thread(read.wait, 5)
        registry.add("a", "law")
        names.forget()
        assert (await names.version("law@2", A)).version == 2  # the new generation is known now
        go_on.set()
        assert (await overtaken).version == 1  # what it was when asked
        assert (await names.version("law", A)).version == 2

    asyncio.run(main())


def test_what_is_kept_of_a_missing_name_does_not_grow_with_the_calls_that_ask_for_it():
    names = Names(StubRegistry())

    async def main() -> None:
        for _ in range(20):
            with pytest.raises(ApiError):
                await names.version("law", A)

    asyncio.run(main())
    [kept] = names._kept.values()
    assert len(list(traceback.walk_tb(kept.__traceback__))) < 5


def test_a_name_longer_than_any_can_be_is_neither_looked_up_nor_kept():
    registry = StubRegistry()
    names = Names(registry)
    with pytest.raises(ApiError) as missing:
        asyncio.run(names.version("x" * 2000, A))
    assert missing.value.code == "model_not_found"
    assert registry.num_lookups == 0 and not names._kept


def test_mixes_of_one_content_twice_and_adapters_of_another_base_are_refused():
    registry = StubRegistry()
    registry.add("local", "law")
    registry.add("local", "far", base_digest="f" * 64)
    http = client(stub_services(registry=registry, base=SimpleNamespace(digest="b" * 64)))
    for model, code in (
        ("law*0.5+law@1*0.5", "invalid_model"),
        ("far", "wrong_base"),
        ("router:law", "not_a_router"),
    ):
        response = http.post("/v1/completions", json={"model": model, "prompt": "x"})
        assert error_of(response, 400)["code"] == code
    registry.add("local", "mixed", servability="per_prompt")
    body = http.post("/v1/completions", json={"model": "router:mixed", "prompt": "x"}).json()
    assert body["loramux"]["router"] == body["model"] == "local/mixed@1"


# --- auto -------------------------------------------------------------------------------------------

TOPICS = {
    "law": "contract clause court judge liability tenant lease",
    "food": "recipe oven flour sugar bake kitchen dinner",
    "code": "python function compile error variable loop array",
}


def pool(owners: dict[str, str], seed: int = 0) -> tuple[StubRegistry, Retriever]:
    """A registry and a lexical retriever over the topics; owners: tenant of each."""
    draw = random.Random(seed)
    registry, retriever = StubRegistry(), Retriever(min_score=0.05)
    for topic, owner in owners.items():
        words = TOPICS[topic].split()
        samples = [" ".join(draw.sample(words, 4)) for _ in range(20)]
        version = registry.add(owner, topic)
        retriever.upsert(version.ref, make_profile(samples), owner=owner)
    return registry, retriever


def test_auto_answers_with_what_fits_and_says_why():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    http = client(stub_services(registry=registry, retriever=retriever))
    for topic, asked in (("law", "which court and judge?"), ("food", "bake sugar in the oven")):
        messages = [
            {"role": "system", "content": TOPICS["code"]},
            {"role": "user", "content": asked},
        ]
        response = http.post("/v1/chat/completions", json={"model": "auto", "messages": messages})
        body = response.json()
        assert body["model"] == response.headers["x-loramux-adapter"] == f"local/{topic}@1"
        routing = body["loramux"]["routing"]
        assert [hit["ref"] for hit in routing["chosen"]] == [f"local/{topic}@1"]
        assert len(routing["runners_up"]) == 2 and not routing["abstained"]
        assert routing["chosen"][0]["score"] > routing["runners_up"][0]["score"]


def test_auto_falls_back_to_the_base_where_nothing_fits():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    http = client(stub_services(registry=registry, retriever=retriever))
    body = http.post("/v1/completions", json={"model": "auto", "prompt": "zebra quagga"}).json()
    assert body["model"] == "pico" and body["loramux"]["adapters"] == []
    assert body["loramux"]["routing"]["abstained"] and body["loramux"]["routing"]["reason"]


def test_auto_mixes_where_the_configuration_says_so():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    http = client(
        stub_services(registry=registry, retriever=retriever), retrieval={"mode": "mixture", "k": 2}
    )
    body = http.post(
        "/v1/completions", json={"model": "auto", "prompt": "court judge lease"}
    ).json()
    assert [part["weight"] for part in body["loramux"]["adapters"]] == [0.5, 0.5]


def test_auto_counts_one_content_under_two_names_once_with_both_weights():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    law = registry.resolve("local/law", caller=None)
    copy = registry.add("zoo", "copy", digest=law.digest, visibility="shared")
    samples = [f"{word} court judge lease" for word in TOPICS["law"].split()] * 2
    profile = make_profile([f"{s} {n}" for n, s in enumerate(samples)])
    retriever.upsert(copy.ref, profile, owner="zoo", tags={"readers": ("*",)})
    http = client(
        stub_services(registry=registry, retriever=retriever), retrieval={"mode": "mixture", "k": 2}
    )
    asked = {"model": "auto", "prompt": "court judge lease"}
    body = http.post("/v1/completions", json=asked).json()
    refs = {hit["ref"] for hit in body["loramux"]["routing"]["chosen"]}
    assert refs == {"local/law@1", "zoo/copy@1"}
    [part] = body["loramux"]["adapters"]
    assert part == {"ref": "local/law@1", "digest": law.digest, "weight": 1.0}


def test_auto_does_not_answer_several_prompts_with_the_adapter_of_the_first():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    http = client(stub_services(registry=registry, retriever=retriever))
    prompts = ["which court and judge?", "bake sugar in the oven"]
    response = http.post("/v1/completions", json={"model": "auto", "prompt": prompts})
    assert error_of(response, 400)["param"] == "prompt"
    for prompt, topic in zip(prompts, ("law", "food"), strict=True):
        body = http.post("/v1/completions", json={"model": "auto", "prompt": [prompt]}).json()
        assert body["model"] == f"local/{topic}@1"


def test_auto_does_not_miss_an_adapter_whose_alias_moves_while_it_chooses():
    registry, retriever = pool(dict.fromkeys(TOPICS, "local"))
    profile = make_profile([f"court judge lease {n}" for n in range(12)])
    services = stub_services(registry=registry, retriever=retriever)
    client(services)
    flips = iter(range(3))

    class Moving:
        """Another version takes over between what the caller may use and the search."""

        def retrieve(self, *given: Any, **options: Any) -> Any:
            if next(flips, None) is not None:
                version = registry.add("local", "law")
                retriever.upsert(version.ref, profile, owner="local")
                retriever.delete(f"local/law@{version.version - 1}")
                services.names.forget()
            return retriever.retrieve(*given, **options)

    services.retriever = Moving()
    plan = asyncio.run(choose(services, config(), "auto", "court judge lease", LOCAL_USER))
    assert plan.label == "local/law@4"


def test_a_choice_made_while_the_retriever_follows_is_known_to_be_stale():
    registry, seen = StubRegistry(), []
    names = Names(registry, clock=lambda: 0.0, on_change=lambda: seen.append(names.epoch))
    before = names.epoch
    asyncio.run(names.visible(A))
    assert seen == [before + 1] and names.epoch == before + 2


def test_names_are_resolved_while_what_follows_the_registry_fails_and_it_is_tried_again(caplog):
    """Regression: one failure of the index, and no name was resolved until it was well again."""
    registry, now, tries = StubRegistry(), [0.0], []
    registry.add("local", "law")

    def follow() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionError("the index is away")

    async def main() -> None:
        names = Names(registry, clock=lambda: now[0], on_change=follow)
        for _ in range(5):
            now[0] += 1
            assert (await names.version("law", LOCAL_USER)).ref == "local/law@1"

    asyncio.run(main())
    assert len(tries) == 3
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]  # once each


def test_auto_never_chooses_what_the_caller_may_not_use():
    owners = {"law": "a", "food": "b", "code": "a"}
    registry, retriever = pool(owners)
    services = stub_services(registry=registry, retriever=retriever)
    client(services)  # makes the names
    draw = random.Random(3)
    words = " ".join(TOPICS.values()).split()

    async def main() -> None:
        for _ in range(300):
            caller = draw.choice((A, B))
            asked = " ".join(draw.sample(words, 5))
            plan = await choose(services, config(), "auto", asked, caller)
            used = {version.tenant for version in plan.versions}
            shown = {
                hit["ref"].split("/")[0]
                for hit in (*plan.routing["chosen"], *plan.routing["runners_up"])
            }
            assert used <= {caller.tenant} and shown <= {caller.tenant}

    asyncio.run(main())


def test_auto_makes_no_list_of_what_may_be_used_and_asks_the_registry_about_every_hit():
    registry, retriever = pool({"law": "a", "food": "a", "code": "b"})
    registry.visible = None  # type: ignore[assignment]
    # The index says that everybody may use it; the registry knows better.
    profile = make_profile([f"court judge lease {n}" for n in range(12)])
    retriever.upsert("b/code@1", profile, owner="b", tags={"readers": ("*",)})
    services = stub_services(registry=registry, retriever=retriever)
    client(services)
    plan = asyncio.run(choose(services, config(), "auto", "court judge lease", A))
    assert plan.label == "a/law@1"
    assert not any(hit["ref"].startswith("b/") for hit in plan.routing["runners_up"])


def test_auto_without_a_retriever_is_a_clear_error():
    response = client().post("/v1/completions", json={"model": "auto", "prompt": "x"})
    assert error_of(response, 400)["code"] == "no_retrieval"
