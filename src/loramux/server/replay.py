"""Checks a receipt against a registry, and runs a greedy request again to see whether the tokens are the same.

Why stop texts are not needed: greedy tokens do not depend on where an answer is cut. A replay draws as many tokens as
the receipt counts at most, with the same adapters, and compares their SHA-256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loramux.registry.errors import Corrupt, NotFound, RegistryError
from loramux.registry.names import NameProblem, Ref, parse_ref
from loramux.server.receipts import Receipt, ReceiptError, token_digest

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
    receipt: Receipt, prompts: Sequence[Sequence[int]], engine: Engine, registry: Any
) -> list[Check]:
    """Run the prompts again on `engine`. ReceiptError where a replay can prove nothing."""
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
    for place, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
        if token_digest(prompt) != answer["prompt"]["sha256"]:
            raise ReceiptError(
                f"prompt {place} is not the one that was answered: {len(prompt)} tokens, the receipt has "
                f"{answer['prompt']['tokens']}",
                code="prompt_mismatch",
            )
        checks += _replay(f"answer {place}", answer, receipt, prompt, engine, registry)
    return checks


def _replay(
    what: str,
    answer: dict[str, Any],
    receipt: Receipt,
    prompt: Sequence[int],
    engine: Engine,
    registry: Any,
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
        if not sample["tokens"]:
            checks.append(Check(f"{what}, sample {sample['index']}", None, "it has no tokens"))
            continue
        params = _greedy(receipt.body["sampling"], sample["tokens"])
        request = Request(prompt=list(prompt), adapter=mix or None, params=params)
        [[done]] = engine.generate([request])
        checks += _compare(f"{what}, sample {sample['index']}", answer, sample, done)
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
