"""Receipts: what they say, who signed them, and that nothing of them can be changed."""

from __future__ import annotations

import json
import stat
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.engine.request import NOT_FINITE, Answered, Completion, Reason, SamplingParams
from loramux.server.issuer import Issuer
from loramux.server.receipts import (
    HEADER,
    HEADER_LIMIT,
    ID_HEADER,
    Part,
    Receipt,
    ReceiptError,
    decimal,
    describe_answer,
    issue,
    parse,
    token_digest,
    verify,
)
from loramux.server.resolve import Plan
from loramux.server.services import Outcome
from loramux.server.signing import PublicKeys, Signer, SigningError, encode, published
from server.rig import client, stub_services

BASE, LAW, TONE = "b" * 64, "1" * 64, "2" * 64


def completion(**given: Any) -> Completion:
    values = {
        "request_id": "r", "index": 0, "tenant": "ann", "text": "canary answer", "token_ids": (5, 6),
        "finish_reason": "stop", "prompt_tokens": 3,
        "answered": Answered(BASE, ((LAW, "c1", 0.7), (TONE, "c2", 0.3))),
    }  # fmt: skip
    return Completion(**{**values, **given})


def sample_receipt(signer: Signer, num_parts: int = 2) -> Receipt:
    answer = describe_answer(
        [completion()],
        prompt=[1, 2, 3],
        parts=[Part("ann/law@3", LAW, 0.7), Part("ann/tone@1", TONE, 0.3)] * (num_parts // 2),
        routing={"mode": "auto", "score": 0.1234567},
    )
    params = SamplingParams(max_tokens=8, stop=("canary stop",), temperature=0.7, seed=3)
    model = "ann/law@3*0.7+ann/tone@1*0.3"
    return issue(
        signer, id="call-1", tenant="ann", model=model, answers=[answer], params=params, debit=5, now=0.5
    )  # fmt: skip


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.open(tmp_path_factory.mktemp("keys"))


# --- The receipt ------------------------------------------------------------------------------------


def test_a_receipt_says_what_the_engine_reported(signer: Signer) -> None:
    body = sample_receipt(signer).to_json()
    [answer] = body["answers"]
    assert answer["base"] == BASE
    assert answer["parts"] == [
        {"ref": "ann/law@3", "digest": LAW, "weight": "0.7", "content": "c1"},
        {"ref": "ann/tone@1", "digest": TONE, "weight": "0.3", "content": "c2"},
    ]
    assert answer["prompt"] == {"tokens": 3, "sha256": token_digest([1, 2, 3])}
    assert answer["completions"][0]["sha256"] == token_digest([5, 6])
    assert (body["tenant"], body["debit"], body["time"]) == ("ann", 5, "1970-01-01T00:00:00.500Z")


def test_an_engine_that_ran_something_else_shows_in_the_receipt() -> None:
    other = completion(answered=Answered(BASE, ((TONE, "c9", 1.0),)))
    answer = describe_answer([other], prompt=[1], parts=[Part("ann/law@3", LAW)])
    assert answer["parts"] == [{"ref": "unknown", "digest": TONE, "weight": "1", "content": "c9"}]


def test_nothing_that_was_said_is_in_a_receipt(signer: Signer) -> None:
    assert "canary" not in json.dumps(sample_receipt(signer).to_json())


def test_a_receipt_holds_no_fraction_that_a_json_library_could_rewrite(signer: Signer) -> None:
    def numbers(value: Any) -> list[Any]:
        if isinstance(value, dict | list):
            items = value.values() if isinstance(value, dict) else value
            return [number for item in items for number in numbers(item)]
        return [value] if isinstance(value, int | float) else []

    assert all(isinstance(number, int) for number in numbers(sample_receipt(signer).to_json()))
    assert [decimal(x) for x in (1.0, 0.7, 1e-9, 0)] == ["1", "0.7", "1e-09", "0"]


def test_every_changed_byte_of_a_receipt_is_noticed(signer: Signer) -> None:
    receipt = sample_receipt(signer)
    header = receipt.to_header()
    assert header is not None
    text = json.dumps(receipt.to_json(), sort_keys=True, separators=(",", ":"))
    verify(parse(header), signer.public)
    verify(parse(text), signer.public)
    for whole in (header, text):
        for place, char in enumerate(whole):
            others = {chr(ord(char) ^ 1)} | ({"A", "0", " "} if place % 16 == 0 else set())
            for other in others - {char}:
                changed = f"{whole[:place]}{other}{whole[place + 1 :]}"
                with pytest.raises(ReceiptError):
                    verify(parse(changed), signer.public)


def test_another_spelling_of_the_same_signature_is_noticed(signer: Signer) -> None:
    receipt = sample_receipt(signer)
    *head, last = receipt.signature
    # 64 bytes leave four bits of the last character over, which a lenient reader drops.
    sibling = {"A": "B", "Q": "R", "g": "h", "w": "x"}[last]
    for spelling in ("".join([*head, sibling]), receipt.signature + "==", receipt.signature + "\n"):
        with pytest.raises(ReceiptError):
            verify(replace(receipt, signature=spelling), signer.public)


def test_a_missing_or_added_field_is_noticed(signer: Signer) -> None:
    whole = sample_receipt(signer).to_json()
    for key in set(whole) - {"signature"}:
        cut = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(ReceiptError):
            verify(parse(cut), signer.public)
    with pytest.raises(ReceiptError, match="changed"):
        verify(parse({**whole, "more": 1}), signer.public)


def test_a_receipt_is_found_in_a_reply_and_in_its_header(signer: Signer) -> None:
    receipt = sample_receipt(signer)
    reply = json.dumps({"id": "x", "loramux": {"receipt": receipt.to_json()}}, indent=1)
    assert parse(reply) == parse(str(receipt.to_header())) == receipt
    for wrong in ("", "{}", "[]", "null", "not a receipt", '{"signature": "x"}', "{" * 10_000):
        with pytest.raises(ReceiptError):
            parse(wrong)


def test_a_header_has_one_spelling(signer: Signer) -> None:
    receipt = sample_receipt(signer)
    loose = json.dumps(receipt.to_json(), indent=1).encode()
    with pytest.raises(ReceiptError, match="not canonical"):
        parse(encode(loose))
    assert parse(loose) == receipt


def test_a_receipt_too_long_for_a_header_is_in_the_body_alone(signer: Signer) -> None:
    parts = [Part(f"ann/adapter-{i}@1", LAW) for i in range(40)]
    answer = describe_answer([completion(answered=Answered(""))], prompt=[1], parts=parts)
    long = issue(
        signer, id="call-2", tenant="ann", model="m", answers=[answer], params=SamplingParams(), debit=1
    )  # fmt: skip
    assert long.headers() == {ID_HEADER: "call-2"}
    assert len(sample_receipt(signer).headers()[HEADER]) <= HEADER_LIMIT


# --- Keys -------------------------------------------------------------------------------------------


def test_the_private_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(Signer.open(tmp_path).key_id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Signer.open(tmp_path)
    (tmp_path / "signing.key").chmod(0o640)
    with pytest.raises(SigningError, match="chmod 600"):
        Signer.open(tmp_path)


def test_receipts_of_a_key_that_was_rotated_still_verify(tmp_path: Path) -> None:
    old = Signer.open(tmp_path)
    receipt = sample_receipt(old)
    new = Signer.rotate(tmp_path)
    assert new.key_id != old.key_id == receipt.body["key"]
    verify(receipt, new.public)
    verify(receipt, published(tmp_path))
    assert PublicKeys.from_json(new.keys_json()).ids == sorted([old.key_id, new.key_id])
    assert old.key_id not in (tmp_path / "signing.key").read_text()


def test_a_public_key_removed_while_they_are_listed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Signer.open(tmp_path)
    gone = tmp_path / "public" / f"{'0' * 32}.json"
    gone.write_text("{}")
    inner = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == gone:
            path.unlink()
        return inner(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert published(tmp_path).ids == [signer.key_id]


def test_a_stranger_s_key_is_not_taken_for_the_server_s(tmp_path: Path, signer: Signer) -> None:
    stranger = Signer.open(tmp_path)
    receipt = sample_receipt(stranger)
    with pytest.raises(ReceiptError, match="not among") as caught:
        verify(receipt, signer.public)
    assert caught.value.code == "unknown_key"
    swapped = {**stranger.keys_json()["keys"][0], "key_id": signer.key_id}
    with pytest.raises(SigningError, match="not the one of that id"):
        PublicKeys.from_json(swapped)


def test_openssl_agrees_on_what_was_signed(tmp_path: Path, signer: Signer) -> None:
    """Another implementation, over bytes put together by hand."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from loramux.server.signing import decode

    [key] = [k for k in signer.keys_json()["keys"] if k["key_id"] == signer.key_id]
    public = Ed25519PublicKey.from_public_bytes(decode(key["public_key"]))
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    body = sample_receipt(signer).to_json()
    signature = decode(body.pop("signature"))
    said = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    files = {"key.pem": pem, "sig": signature, "message": b"loramux receipt v1\0" + said}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = "openssl pkeyutl -verify -pubin -inkey key.pem -rawin -in message -sigfile sig"
    try:
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.returncode == 0, done.stderr
    assert PublicKeys.from_file(tmp_path / "key.pem").ids == [signer.key_id]


# --- What was pinned --------------------------------------------------------------------------------


def outcome(plan: Plan, *completions: Completion) -> Outcome:
    return Outcome(
        id="call-3", created=0, caller=SimpleNamespace(tenant="ann"), plan=plan, prompts=((1, 2),),
        params=SamplingParams(), completions=completions, debit=4, by_prompt=(completions,),
    )  # fmt: skip


def test_an_answer_by_other_weights_than_the_pinned_ones_is_counted_and_shown(
    signer: Signer, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = Issuer(signer)
    version = SimpleNamespace(ref="ann/law@3", digest=LAW)
    plan = Plan("ann/law@3", ((LAW, 1.0),), (version,))
    good = completion(answered=Answered(BASE, ((LAW, "c1", 1.0),)))
    issuer.issue(outcome(plan, good))
    assert issuer.num_mismatched == 0
    receipt = issuer.issue(
        outcome(plan, replace(good, answered=Answered(BASE, ((TONE, "c2", 1.0),))))
    )
    assert issuer.num_mismatched == 1 and "not what was pinned" in caplog.text
    assert receipt.answers[0]["parts"][0]["digest"] == TONE


def test_a_set_under_a_router_names_its_members_and_the_router(signer: Signer) -> None:
    members = {TONE: SimpleNamespace(ref="bob/tone@1"), LAW: SimpleNamespace(ref="ann/law@3")}
    plan = Plan(
        "router:ramole", (("set", 1.0),), router="ramole", router_digest="r" * 64,
        assembled=SimpleNamespace(versions=members), routing={"mode": "ramole", "score": 0.5},
    )  # fmt: skip
    done = completion(answered=Answered(BASE, (("set", "c3", 1.0),)))
    [answer] = Issuer(signer).issue(outcome(plan, done)).answers
    assert answer["parts"] == [
        {"ref": "router:ramole", "digest": "set", "weight": "1", "content": "c3"}
    ]
    assert answer["router"] == {
        "ref": "ramole",
        "digest": "r" * 64,
        "members": [{"ref": "ann/law@3", "digest": LAW}, {"ref": "bob/tone@1", "digest": TONE}],
    }
    assert answer["routing"] == {"mode": "ramole", "score": "0.5"}


def test_a_call_that_never_ran_names_what_was_pinned(signer: Signer) -> None:
    version = SimpleNamespace(ref="ann/law@3", digest=LAW)
    plan = Plan("ann/law@3", ((LAW, 1.0),), (version,))
    never = completion(answered=Answered(""), token_ids=(), finish_reason="abort")
    [answer] = Issuer(signer, base=BASE).issue(outcome(plan, never)).answers
    assert (answer["base"], answer["parts"][0]["content"]) == (BASE, None)


# --- From the server --------------------------------------------------------------------------------


@pytest.fixture
def served(signer: Signer) -> Any:
    return client(stub_services(signer=Issuer(signer)))


def checked(served: Any, given: Any) -> Receipt:
    """The receipt in a reply, verified with the key that the server publishes."""
    keys = PublicKeys.from_json(served.get("/v1/receipts/key").json())
    receipt = parse(given)
    verify(receipt, keys)
    return receipt


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


CHAT = {"messages": [{"role": "user", "content": "canary prompt"}], "max_tokens": 8}


def test_a_reply_carries_its_receipt_in_body_and_header(served: Any) -> None:
    reply = served.post("/v1/chat/completions", json={"model": "law*0.7+tone*0.3", **CHAT})
    receipt = checked(served, reply.text)
    assert parse(reply.headers[HEADER]) == receipt
    assert reply.headers[ID_HEADER] == receipt.id and reply.json()["id"].endswith(receipt.id)
    [answer] = receipt.answers
    assert [part["ref"] for part in answer["parts"]] == ["local/law@1", "local/tone@1"]
    assert [part["weight"] for part in answer["parts"]] == ["0.7", "0.3"]
    assert "canary" not in json.dumps(receipt.to_json())
    usage = reply.json()["usage"]
    assert receipt.body["debit"] == usage["total_tokens"]


def test_a_stream_ends_with_its_receipt(served: Any) -> None:
    reply = served.post("/v1/chat/completions", json={"model": "law", "stream": True, **CHAT})
    said = events(reply.text)
    [last] = [chunk for chunk in said if chunk.get("loramux")]
    receipt = checked(served, last)
    assert receipt.answers[0]["parts"][0]["ref"] == "local/law@1"
    assert receipt.answers[0]["completions"][0]["tokens"] > 0


def test_every_sample_and_every_prompt_is_in_the_receipt(served: Any) -> None:
    asked = {"model": "law", "prompt": ["one", "three"], "n": 3, "max_tokens": 4}
    reply = served.post("/v1/completions", json=asked)
    receipt = checked(served, reply.text)
    assert [answer["prompt"]["tokens"] for answer in receipt.answers] == [3, 5]
    assert [[c["index"] for c in a["completions"]] for a in receipt.answers] == [[0, 1, 2]] * 2


def test_an_error_after_the_first_token_carries_a_receipt(signer: Signer) -> None:
    services = stub_services(signer=Issuer(signer))
    served = client(services)
    services.engine.fail = Reason("of one row", NOT_FINITE)  # type: ignore[attr-defined]
    reply = served.post("/v1/chat/completions", json={"model": "law", "stream": True, **CHAT})
    last = events(reply.text)[-1]
    assert last["error"]["code"] == "not_finite"
    receipt = checked(served, last)
    assert receipt.answers[0]["parts"][0]["ref"] == "local/law@1"


def test_a_server_that_signs_nothing_says_so() -> None:
    served = client(stub_services())
    assert served.get("/v1/receipts/key").status_code == 404
    reply = served.post("/v1/chat/completions", json={"model": "law", **CHAT})
    assert reply.json()["loramux"]["receipt"] is None and HEADER not in reply.headers
