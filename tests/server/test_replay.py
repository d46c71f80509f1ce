"""Receipts against the weights themselves: replays, mixed batches, and aliases that move under load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from loramux.cli.main import main
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.engine.request import Request, SamplingParams
from loramux.registry import Registry
from loramux.server.app import create_app
from loramux.server.issuer import Issuer
from loramux.server.receipts import ReceiptError, parse, token_digest, verify
from loramux.server.replay import check_registry, check_reply, replay
from loramux.server.services import Services
from loramux.server.signing import Signer
from server.bases import World, make_world
from server.flips import FLIPS, Flips, last_of
from server.rig import LOCAL, config

PROMPT = [7, 20, 33, 41]
SIZES = {"kv_memory": "4MiB", "adapter_memory": "64MiB", "slot_memory": "64MiB"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registry(world: World, home: Path) -> Iterator[Registry]:
    with Registry.open(home) as registry:
        for name in ("law", "tone"):
            for version in range(2):
                world.publish(registry, name, version)
        yield registry


@pytest.fixture(scope="module")
def services(world: World, registry: Registry, home: Path) -> Iterator[Services]:
    engine = Engine(str(world.base), **SIZES)
    front = AsyncEngine(engine)
    signer = Signer.open(home / "server" / "receipts")
    yield Services(
        engine=front, registry=registry, tokenizer=engine.tokenizer, base=world.shape,
        max_length=engine.max_length, signer=Issuer(signer, world.shape.digest),
    )  # fmt: skip
    asyncio.run(front.shutdown(finish=False))


@pytest.fixture(scope="module")
def app(services: Services) -> Any:
    return create_app(config(), services)


@pytest.fixture(scope="module")
def again(world: World) -> Iterator[Engine]:
    """Another engine over the same base, as whoever checks a receipt has one."""
    with Engine(str(world.base), **SIZES) as engine:
        yield engine


def ask(app: Any, model: str, prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
    reply = TestClient(app, base_url=LOCAL).post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def all_right(checks: list[Any]) -> bool:
    return bool(checks) and all(check.is_right for check in checks)


# --- Replays ----------------------------------------------------------------------------------------


def test_a_greedy_reply_runs_again_to_the_same_tokens(
    app: Any, again: Engine, registry: Registry
) -> None:
    for model in ("pico", "law", "law@1", "law*0.7+tone*0.3", "tone@2"):
        receipt = parse(ask(app, model))
        checks = replay(receipt, [PROMPT], again, registry)
        assert all_right(checks) and len(checks) == 3, (model, checks)
        assert all(check.is_right for check in check_registry(receipt, registry))


def test_several_prompts_stops_and_penalties_run_again(
    app: Any, again: Engine, registry: Registry
) -> None:
    prompts = [[5, 6, 7], [30, 31]]
    reply = ask(
        app, "law*0.1+tone*0.1", prompts, n=2, max_tokens=12, stop=["e", "a"],
        repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=2,
    )  # fmt: skip
    checks = replay(parse(reply), prompts, again, registry)
    assert len(checks) == 12 and all_right(checks)


def test_an_end_that_min_tokens_forbade_is_forbidden_again(
    app: Any, services: Services, again: Engine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = asyncio.run(services.engine.call(lambda engine: engine))
    [[first]] = again.generate(
        [Request(prompt=PROMPT, params=SamplingParams(max_tokens=1, temperature=0))]
    )
    # The likeliest token is the end: without `min_tokens` the answer is over at once.
    for each in (engine, again):
        monkeypatch.setattr(each._parts, "eos", frozenset(first.token_ids))
    receipt = parse(ask(app, "pico", max_tokens=4, min_tokens=3))
    assert receipt.answers[0]["completions"][0]["tokens"] > 1
    assert all_right(replay(receipt, [PROMPT], again, registry))


def test_a_chat_runs_again_from_its_messages(
    app: Any, again: Engine, registry: Registry, home: Path, world: World, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    body = {
        "model": "law", "messages": [{"role": "user", "content": "hi you"}], "max_tokens": 5,
        "temperature": 0,
    }  # fmt: skip
    reply = TestClient(app, base_url=LOCAL).post("/v1/chat/completions", json=body)
    files = {"reply.json": reply.text, "prompt.json": json.dumps(body), "other.json": '"hi"'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    given = ["verify", str(tmp_path / "reply.json"), "--registry", str(home)]
    more = ["--replay", "--base", str(world.base), "--prompt"]
    assert main([*given, *more, str(tmp_path / "prompt.json"), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["is_right"] and [check["is_right"] for check in result["checks"]] == [True] * 7
    assert main([*given, *more, str(tmp_path / "other.json")]) == 2
    assert "is not the one that was answered" in capsys.readouterr().err


def test_a_reply_that_says_other_than_its_receipt_is_found_out(
    app: Any, again: Engine, registry: Registry
) -> None:
    reply = ask(app, "law*0.7+tone*0.3", [PROMPT, [30, 31]], echo=True)
    receipt, first = parse(json.dumps(reply)), reply["choices"][0]
    for changed in (
        {}, {"model": "local/tone@1"}, {"usage": {**reply["usage"], "completion_tokens": 99}},
        {"choices": [first]}, {"loramux": {**reply["loramux"], "adapters": []}},
        {"choices": [first, {**first, "finish_reason": "other"}]},
        {"choices": [first, first]}, {"choices": ["x", 3]}, {"choices": "xy"},
        {"loramux": {**reply["loramux"], "adapters": [
            {**each, "weight": 0.5} for each in reply["loramux"]["adapters"]
        ]}},
        {"loramux": {**reply["loramux"], "adapters": ["x", None]}}, {"usage": ["x"]},
    ):  # fmt: skip
        assert check_reply({**reply, **changed}, receipt).is_right is not bool(changed)
    for text in (first["text"], "other", ""):
        told = {**reply, "choices": [{**first, "text": text}, reply["choices"][1]]}
        checks = replay(receipt, [PROMPT, [30, 31]], again, registry, told)
        wrong = [check.what for check in checks if not check.is_right]
        assert wrong == ([] if text == first["text"] else ["answer 0, sample 0: text"])
    for forged in (
        {**first, "message": {"content": "other"}}, {**first, "message": "other"},
        {**first, "message": {"content": None}}, {**first, "text": None}, {**first, "text": 3},
    ):  # fmt: skip
        told = {**reply, "choices": [forged, reply["choices"][1]]}
        checks = replay(receipt, [PROMPT, [30, 31]], again, registry, told)
        assert [c.what for c in checks if not c.is_right] == ["answer 0, sample 0: text"]


def test_choices_are_compared_by_their_numbers_as_clients_read_them(
    app: Any, again: Engine, registry: Registry
) -> None:
    reply = ask(app, "law", [PROMPT, [30, 31]], echo=True)
    receipt, (one, two) = parse(json.dumps(reply)), reply["choices"]
    swapped = [{**one, "text": two["text"]}, {**two, "text": one["text"]}]
    for choices, num_wrong in (([two, one], 0), (swapped, 2)):
        told = {**reply, "choices": choices}
        checks = replay(receipt, [PROMPT, [30, 31]], again, registry, told)
        assert check_reply(told, receipt).is_right
        assert [check.is_right for check in checks].count(False) == num_wrong


def test_a_reply_without_tokens_is_right_and_one_that_says_more_is_not(
    app: Any, again: Engine, registry: Registry
) -> None:
    reply = ask(app, "law", max_tokens=0, echo=True)
    receipt, [choice] = parse(json.dumps(reply)), reply["choices"]
    for more, is_right in (("", True), ("more", False)):
        told = {**reply, "choices": [{**choice, "text": choice["text"] + more}]}
        assert check_reply(told, receipt).is_right
        assert all_right(replay(receipt, [PROMPT], again, registry, told)) is is_right


def test_where_a_stop_text_cut_a_reply_cannot_be_told_and_is_not_called_right(
    app: Any, again: Engine, registry: Registry
) -> None:
    whole = ask(app, "law", max_tokens=6)["choices"][0]["text"]
    reply = ask(app, "law", max_tokens=6, stop=[whole[-3:], "never said"])
    receipt, [choice] = parse(json.dumps(reply)), reply["choices"]
    assert choice["finish_reason"] == "stop" and check_reply(reply, receipt).is_right
    for text, is_right in ((choice["text"], None), ("", None), ("other", False)):
        told = {**reply, "choices": [{**choice, "text": text}]}
        *_, check = replay(receipt, [PROMPT], again, registry, told)
        assert check.what.endswith("text") and check.is_right is is_right


def test_without_a_replay_the_command_says_that_it_did_not_look_at_the_text(
    app: Any, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = ask(app, "law")
    given = ["verify", str(tmp_path / "reply.json"), "--registry", str(home)]
    chunk = {**reply, "usage": None}
    for file, told in ((reply, [True, None]), (chunk, [None]), (reply["loramux"]["receipt"], [])):
        (tmp_path / "reply.json").write_text(json.dumps(file))
        assert main([*given, "--json", "-"]) == 0
        checks = json.loads(capsys.readouterr().out)["checks"]
        assert [c["is_right"] for c in checks if c["what"] in ("reply", "text")] == told
    (tmp_path / "reply.json").write_text(json.dumps({**reply, "model": "local/tone@1"}))
    assert main(given) == 2


def test_verify_needs_to_know_whose_signature(
    app: Any, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = ask(app, "law")
    keys = TestClient(app, base_url=LOCAL).get("/v1/receipts/key").text
    Signer.open(tmp_path / "stranger")
    stranger = next((tmp_path / "stranger" / "public").iterdir())
    (tmp_path / "reply.json").write_text(json.dumps(reply))
    (tmp_path / "keys.json").write_text(keys)
    given = ["verify", str(tmp_path / "reply.json")]
    assert main(given) == 2
    assert main([*given, "--server-key", str(tmp_path / "keys.json")]) == 0
    assert main([*given, "--server-key", str(stranger)]) == 2
    assert "is not among the 1 given" in capsys.readouterr().err
    reply["loramux"]["receipt"]["debit"] += 1
    (tmp_path / "reply.json").write_text(json.dumps(reply))
    assert main([*given, "--server-key", str(tmp_path / "keys.json")]) == 2


def test_what_cannot_be_replayed_says_why(app: Any, again: Engine, registry: Registry) -> None:
    sampled = parse(ask(app, "law", temperature=1, seed=1))
    greedy = parse(ask(app, "law"))
    for receipt, prompts, code in (
        (sampled, [PROMPT], "not_replayable"),
        (greedy, [PROMPT[:-1]], "prompt_mismatch"),
        (greedy, [], "prompt_mismatch"),
    ):
        with pytest.raises(ReceiptError) as caught:
            replay(receipt, prompts, again, registry)
        assert caught.value.code == code


def test_a_set_put_together_for_the_call_and_a_version_that_is_gone_cannot_be_replayed(
    app: Any, again: Engine, registry: Registry
) -> None:
    receipt = parse(ask(app, "law"))
    [answer] = receipt.answers
    [part] = answer["parts"]
    member = {"ref": part["ref"], "digest": part["digest"]}
    router = {"ref": "router:ramole", "digest": "a" * 64, "members": [member]}
    for changed, said in (
        ({"router": router}, "--registry checks its members"),
        ({"parts": [{**part, "digest": "0" * 64}]}, "is not in the registry"),
        ({"parts": [{**part, "ref": "../law"}]}, "is not in the registry"),
    ):
        told = replace(receipt, body={**receipt.body, "answers": [{**answer, **changed}]})
        with pytest.raises(ReceiptError, match=said) as caught:
            replay(told, [PROMPT], again, registry)
        assert caught.value.code == "not_replayable"
    # Without members a router is a mixture of the registry, and runs again.
    told = {**answer, "router": {**router, "members": []}}
    known = replace(receipt, body={**receipt.body, "answers": [told]})
    assert all_right(replay(known, [PROMPT], again, registry))


def test_the_command_says_that_a_sampled_answer_cannot_be_replayed(
    app: Any, world: World, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reply.json").write_text(json.dumps(ask(app, "law", temperature=1, seed=1)))
    (tmp_path / "prompt.json").write_text(json.dumps(PROMPT))
    given = ["verify", str(tmp_path / "reply.json"), "--registry", str(home)]
    assert main(given) == 0
    more = ["--replay", "--base", str(world.base), "--prompt", str(tmp_path / "prompt.json")]
    assert main([*given, *more]) == 2
    assert "the request was sampled" in capsys.readouterr().err


def test_other_tokens_other_weights_and_another_base_are_found_out(
    app: Any, again: Engine, registry: Registry
) -> None:
    receipt = parse(ask(app, "law"))
    other = parse(ask(app, "tone"))

    def with_answer(**changed: Any) -> Any:
        [answer] = receipt.answers
        return replace(receipt, body={**receipt.body, "answers": [{**answer, **changed}]})

    lies = {
        "tokens": with_answer(completions=other.answers[0]["completions"]),
        "contents": with_answer(
            parts=[{**receipt.answers[0]["parts"][0], "content": other.answers[0]["parts"][0]["content"]}]
        ),
        "base": with_answer(base="f" * 64),
    }  # fmt: skip
    for what, lie in lies.items():
        wrong = [c.what for c in replay(lie, [PROMPT], again, registry) if not c.is_right]
        assert wrong == [f"answer 0, sample 0: {what}"]
    moved = with_answer(parts=[{**receipt.answers[0]["parts"][0], "ref": "local/law@7"}])
    assert [check.is_right for check in check_registry(moved, registry)] == [False]


def test_a_registry_that_lost_or_damaged_the_bytes_is_found_out(
    app: Any, again: Engine, world: World, tmp_path: Path
) -> None:
    receipt = parse(ask(app, "law"))
    with Registry.open(tmp_path) as other:
        assert [check.is_right for check in check_registry(receipt, other)] == [False]
        for version in range(2):
            world.publish(other, "law", version)
        assert all_right(check_registry(receipt, other))
        files = [*(tmp_path / "blobs").rglob("*"), *(tmp_path / "cache").rglob("*.safetensors")]
        for path in files:
            if path.is_file() and path.stat().st_size > 2000:
                path.chmod(0o600)
                data = bytearray(path.read_bytes())
                data[-1] ^= 1
                path.write_bytes(data)
        assert [check.is_right for check in check_registry(receipt, other)] == [False]


# --- Under load -------------------------------------------------------------------------------------


def test_receipts_of_a_mixed_batch_name_the_true_digests(
    app: Any, services: Services, again: Engine, registry: Registry
) -> None:
    models = ["pico", "law", "tone", "law@1", "tone@1", "law*0.6+tone*0.4", "tone*0.2+law*0.8"] * 3
    bodies = [
        {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        for model in models
    ]

    async def run() -> list[Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=LOCAL) as http:
            return await asyncio.gather(*(http.post("/v1/completions", json=b) for b in bodies))

    replies = asyncio.run(run())
    digests = {
        each.ref: each.digest for n in ("law", "tone") for each in registry.versions(n, None)
    }
    for model, reply in zip(models, replies, strict=True):
        receipt = parse(reply.text)
        [answer] = receipt.answers
        assert all(part["digest"] == digests[part["ref"]] for part in answer["parts"]), model
        assert len(answer["parts"]) == (0 if model == "pico" else model.count("*") or 1)
        assert all_right(replay(receipt, [PROMPT], again, registry)), model
    issuer = services.signer
    assert isinstance(issuer, Issuer) and issuer.num_mismatched == 0


def test_aliases_that_move_under_load_fail_no_request_and_mix_no_answer(
    app: Any, services: Services, world: World, registry: Registry
) -> None:
    registry.set_alias("local/law", "prod", 1, actor="test")
    flips = Flips(app)
    asyncio.run(flips.run())
    assert {status for status, _ in flips.replies} == {200}
    markers = {f"local/law@{version + 1}": world.marker("law", version) for version in range(2)}
    digests = {each.ref: each.digest for each in registry.versions("law", None)}
    issuer = services.signer
    assert isinstance(issuer, Issuer)
    seen = []
    for _, text in flips.replies:
        reply = last_of(text)
        receipt = parse(reply)
        verify(receipt, issuer.signer.public)
        [answer] = receipt.answers
        [part] = answer["parts"]
        seen.append(part["ref"])
        assert reply["model"] == receipt.body["model"] == part["ref"]
        assert part["digest"] == digests[part["ref"]]
        # Every token is the one that this content makes the base say: nobody else's rows had a part in it.
        assert answer["completions"][0]["sha256"] == token_digest([markers[part["ref"]]] * 6)
    assert set(seen) == set(markers) and len(seen) >= FLIPS
    assert issuer.num_mismatched == 0
