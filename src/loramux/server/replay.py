"""Checks a receipt against the reply that brought it and against a registry, and runs a greedy request again.

Why stop texts are not needed: greedy tokens do not depend on where an answer is cut. A replay draws as many tokens as
the receipt counts at most, with the same adapters, and compares their SHA-256. Only such a replay says whether a
reply's text is what was drawn: a receipt has no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loramux.registry.errors import Corrupt, NotFound, RegistryError
from loramux.registry.names import NameProblem, Ref, parse_ref
from loramux.server.receipts import Receipt, ReceiptError, decimal, token_digest

if TYPE_CHECKING:
    from loramux.engine.engine import Engine
    from loramux.engine.request import Completion, SamplingParams


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `is_right` None: it could not be told."""

    what: str
    is_right: bool | None
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_reply(reply: Mapping[str, Any], receipt: Receipt) -> Check:
    """Whether a whole reply says what its receipt says: who answered, how many tokens, how each choice ended."""
    said, signed = _said(reply), _signed(receipt)
    if _is_silent(reply, receipt):
        signed["usage"][1] = 0
        signed["ends"] = [(index, "length") for index, _ in signed["ends"]]
    wrong = [key for key in signed if said[key] != signed[key]]
    if wrong:
        key = wrong[0]
        return Check("reply", False, f"{key}: {said[key]!r}, the receipt says {signed[key]!r}")
    return Check("reply", True, f"{', '.join(signed)} as signed")


def _said(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Of whatever was put into the file: nothing about it is known."""
    usage = reply.get("usage")
    ours = _of(reply.get("loramux"), "adapters") or []
    listed = ours if isinstance(ours, list) else [ours]
    return {
        "model": reply.get("model"),
        "adapters": sorted(
            (str(_of(each, "ref")), str(_of(each, "digest")), _weight(_of(each, "weight")))
            for each in listed
        ),
        "usage": [_of(usage, "prompt_tokens"), _of(usage, "completion_tokens")],
        "ends": [(_of(each, "index"), _of(each, "finish_reason")) for each in _choices(reply)],
    }


def _signed(receipt: Receipt) -> dict[str, Any]:
    samples = [sample for answer in receipt.answers for sample in answer["completions"]]
    return {
        "model": receipt.body.get("model"),
        "adapters": sorted(
            (str(e.get("ref")), str(e.get("digest")), str(e.get("weight"))) for e in _parts(receipt)
        ),
        "usage": [
            sum(answer["prompt"]["tokens"] for answer in receipt.answers),
            sum(sample["tokens"] for sample in samples),
        ],
        "ends": [(index, sample["finish_reason"]) for index, sample in enumerate(samples)],
    }


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _weight(value: Any) -> str:
    """As a receipt writes it. The adapters under `router:ramole` have none."""
    return decimal(value) if isinstance(value, int | float) else str(value)


def _choices(reply: Mapping[str, Any]) -> list[Any]:
    """By their own numbers: a client goes by these, and not by how they lie."""
    found = reply.get("choices")
    listed = found if isinstance(found, list) else []
    numbered = all(type(_of(each, "index")) is int for each in listed)
    return sorted(listed, key=lambda each: int(each["index"])) if numbered else listed


def _is_silent(reply: Mapping[str, Any], receipt: Receipt) -> bool:
    """A call with max_tokens 0: the engine draws one token, which the reply neither has nor counts."""
    drawn = _of(reply.get("usage"), "completion_tokens")
    return bool(drawn == 0 and receipt.body["sampling"]["max_tokens"] == 1)


def check_registry(receipt: Receipt, registry: Any) -> list[Check]:
    """Whether the registry holds, byte for byte, what the receipt says answered."""
    checks = []
    for part in _parts(receipt):
        name, digest = str(part.get("ref")), str(part.get("digest"))
        try:
            version = find_version(registry, name, digest)
            registry.folder(version)  # reads and compares every byte
        except (NotFound, NameProblem):
            checks.append(Check(name, False, f"no version with the digest {digest} is kept"))
        except (Corrupt, RegistryError) as error:
            checks.append(Check(name, False, str(error)))
        else:
            is_same = version.ref == name
            detail = digest if is_same else f"the digest {digest} is now {version.ref}"
            checks.append(Check(name, is_same, detail))
    return checks


def find_version(registry: Any, name: str, digest: str) -> Any:
    """The version of this adapter with this content, whatever its aliases are now."""
    ref = parse_ref(name)
    return registry.resolve(Ref(ref.tenant, ref.name, f"sha256:{digest}"), caller=None)


def replay(
    receipt: Receipt,
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    registry: Any,
    reply: Mapping[str, Any] | None = None,
) -> list[Check]:
    """Run the prompts again on `engine`. ReceiptError where a replay can prove nothing.

    With the `reply` that brought the receipt its texts are compared as well.
    """
    answers = receipt.answers
    if receipt.body["sampling"].get("temperature") != "0":
        raise ReceiptError(
            "the request was sampled; only greedy ones (temperature 0) give the same tokens again",
            code="not_replayable",
        )
    if len(prompts) != len(answers):
        raise ReceiptError(
            f"the receipt has {len(answers)} prompts, {len(prompts)} were given",
            code="prompt_mismatch",
        )
    checks = []
    texts = _texts_of(reply, receipt)
    for place, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        if token_digest(prompt) != answer["prompt"]["sha256"]:
            raise ReceiptError(
                f"prompt {place} is not the one that was answered: {len(prompt)} tokens, the receipt has "
                f"{answer['prompt']['tokens']}",
                code="prompt_mismatch",
            )
        checks += _replay(f"answer {place}", answer, receipt, prompt, engine, registry, texts)
    return checks


@dataclass(frozen=True)
class _Told:
    """What one choice of a reply shows. `texts`: every text in it, one in a reply of ours."""

    texts: list[Any]
    may_echo: bool
    is_silent: bool

    def check(self, which: str, asked: str, drawn: str, is_cut: bool) -> Check:
        """A stop text cuts what was drawn, and `echo` puts the prompt before it."""
        drawn = "" if self.is_silent else drawn
        wholes = (drawn, asked + drawn) if self.may_echo else (drawn,)
        is_same: bool | None = bool(self.texts) and all(text in wholes for text in self.texts)
        told = "as drawn"
        if not is_same:
            told = f"the reply has {self.texts!r:.80}, drawn was {drawn!r:.80}"
        if not is_same and is_cut and self.texts and all(_begins(wholes, t) for t in self.texts):
            is_same, told = None, "begins as drawn; where a stop text cut it, no receipt says"
        return Check(f"{which}: text", is_same, told)


def _begins(wholes: Sequence[str], text: Any) -> bool:
    return isinstance(text, str) and any(whole.startswith(text) for whole in wholes)


def _texts_of(reply: Mapping[str, Any] | None, receipt: Receipt) -> list[_Told] | None:
    """The texts of a reply's choices, in the receipt's order; each answer takes its own from the front."""
    if reply is None:
        return None
    found, is_silent = [], _is_silent(reply, receipt)
    for choice in _choices(reply):
        texts = []
        if _of(choice, "message") is not None:
            texts.append(_of(choice["message"], "content"))
        if _of(choice, "text") is not None:
            texts.append(choice["text"])
        found.append(_Told(texts, _of(choice, "message") is None, is_silent))
    return found


def _replay(
    what: str,
    answer: dict[str, Any],
    receipt: Receipt,
    prompt: Sequence[int],
    engine: Engine,
    registry: Any,
    told: list[_Told] | None,
) -> list[Check]:
    from loramux.engine.request import Request

    if (answer["router"] or {}).get("members"):
        raise ReceiptError(
            f"{what} is of adapters that the server put together under {answer['router']['ref']}, which the registry "
            "does not hold; it cannot be run again, --registry checks its members",
            code="not_replayable",
        )
    mix = {}
    for part in answer["parts"]:
        try:
            version = find_version(registry, part["ref"], part["digest"])
        except (NotFound, NameProblem):
            raise ReceiptError(
                f"{part['ref']} with the digest {part['digest']} is not in the registry; nothing can be run again",
                code="not_replayable",
            ) from None
        if part["digest"] not in engine.adapters:
            engine.add_adapter(part["digest"], registry.folder(version))
        mix[part["digest"]] = float(part["weight"])
    checks = []
    for sample in answer["completions"]:
        which = f"{what}, sample {sample['index']}"
        said = told.pop(0) if told else None
        asked = "" if said is None else str(engine.tokenizer.decode(list(prompt)))
        if not sample["tokens"]:
            checks.append(Check(which, None, "it has no tokens"))
            checks += [] if said is None else [said.check(which, asked, "", False)]
            continue
        params = _greedy(receipt.body["sampling"], sample["tokens"])
        request = Request(prompt=list(prompt), adapter=mix or None, params=params)
        [[done]] = engine.generate([request])
        found = _compare(which, answer, sample, done)
        if said is not None and found[-1].is_right:
            is_cut = receipt.body["sampling"]["num_stop"] > 0 and sample["finish_reason"] == "stop"
            found.append(said.check(which, asked, done.text, is_cut))
        checks += found
    return checks


def _greedy(sampling: dict[str, Any], num_tokens: int) -> SamplingParams:
    from loramux.engine.request import SamplingParams

    return SamplingParams(
        max_tokens=num_tokens,
        min_tokens=min(sampling["min_tokens"], num_tokens),
        repetition_penalty=float(sampling["repetition_penalty"]),
        presence_penalty=float(sampling["presence_penalty"]),
        frequency_penalty=float(sampling["frequency_penalty"]),
        stop_token_ids=tuple(sampling["stop_token_ids"]),
        # As it was run: `min_tokens` bans the end only where it would end.
        ignore_eos=bool(sampling["ignore_eos"]),
    )


def _compare(
    what: str, answer: dict[str, Any], sample: dict[str, Any], done: Completion
) -> list[Check]:
    if done.finish_reason == "error":
        return [Check(what, None, f"the replay failed: {done.error}")]
    told = {digest: content for digest, content, _ in done.answered.parts}
    contents = all(part["content"] in (None, told[part["digest"]]) for part in answer["parts"])
    is_base = answer["base"] == done.answered.base
    is_same = token_digest(done.token_ids) == sample["sha256"]
    return [
        Check(f"{what}: base", is_base, done.answered.base),
        Check(f"{what}: contents", contents, ", ".join(told.values())),
        Check(
            f"{what}: tokens", is_same, f"{len(done.token_ids)} of {sample['tokens']} tokens drawn"
        ),
    ]


def _parts(receipt: Receipt) -> list[dict[str, Any]]:
    """Each part once, in order."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for answer in receipt.answers:
        # A set that was put together under a router is no version; its members are.
        members = (answer["router"] or {}).get("members", ())
        for part in members or answer["parts"]:
            found.setdefault((str(part.get("ref")), str(part.get("digest"))), part)
    return list(found.values())
