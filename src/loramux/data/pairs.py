"""Preference rows as pairs of examples: one prompt, the answer to be preferred, the answer to be avoided.

Keys are those of TRL: `prompt`, `chosen`, `rejected`, as texts or as chat messages; without `prompt`, two conversations
whose common beginning is the prompt. A task row with choices is a pair too: its answer, and one of the others.

Why both are cut alike: a loss that compares two answers is about the answers only if they follow the same prompt.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from loramux.data.chat import ROLES, check_messages, encode_chat
from loramux.data.encode import encode_answer, encode_prompt, end_token, fit
from loramux.data.example import Example
from loramux.data.sources import read_rows
from loramux.data.tasks import answer_text, parse_task_row, question, text_of
from loramux.errors import DataError
from loramux.recipe import DataSource, Template, TextTemplate

log = logging.getLogger(__name__)
PER_PAIR = 2  # rows: chosen, rejected
Tail = tuple[list[int], list[bool]]  # token ids behind the prompt and which of them are supervised
Coded = tuple[list[int], Tail, Tail]


def load_pairs(
    source: DataSource, tokenizer: Any, template: Template = "task", sequence_len: int = 512
) -> list[Example]:
    """Two examples per row of the source, chosen then rejected; prompts that are too long lose tokens on their left."""
    if isinstance(template, TextTemplate):
        raise DataError(
            "data.template: the texts of preference rows are taken as they are; use 'task' or 'chat'"
        )
    examples: list[Example] = []
    num_cut = 0
    for row, where, task in read_rows(source):
        prompt, *tails = encode_pair(row, tokenizer, template, where)
        longest = max((ids for ids, _ in tails), key=len)
        ids, _, cut = fit(prompt, longest, tokenizer.bos_token_id, sequence_len, where)
        kept = ids[: len(ids) - len(longest)]
        unseen = [False] * len(kept)
        examples += [Example.build(task, kept + own, unseen + mask) for own, mask in tails]
        num_cut += cut
    if num_cut:
        log.warning(
            "%s: %d of %d rows are longer than sequence_len=%d; their prompts were cut from the left",
            source.path, num_cut, len(examples) // PER_PAIR, sequence_len,
        )  # fmt: skip
    return examples


def encode_pair(row: Mapping[str, Any], tokenizer: Any, template: Template, where: str) -> Coded:
    """(prompt, chosen, rejected) as token ids."""
    missing = [key for key in ("chosen", "rejected") if row.get(key) is None]
    if not missing:
        coded = _encode(row, tokenizer, template, where)
    elif len(missing) == 2 and row.get("choices") is not None:
        coded = _encode(_from_choices(row, template, where), tokenizer, template, where)
    else:
        raise DataError(
            f"{where}: {' and '.join(map(repr, missing))} missing; a preference row has 'prompt', 'chosen' and "
            "'rejected' (texts or chat messages), or is a task row with 'choices'"
        )
    _, chosen, rejected = coded
    if chosen == rejected:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same answer; drop the row")
    return coded


def check_pairs(rows: Sequence[Example], what: str) -> None:
    """Refuse examples that do not come two by two, each two with one prompt and different answers."""
    if len(rows) % PER_PAIR:
        raise ValueError(
            f"{what}: pairs are two examples each, chosen then rejected; got {len(rows)}"
        )
    for i in range(0, len(rows), PER_PAIR):
        chosen, rejected = rows[i], rows[i + 1]
        prompts = [row.input_ids[: sum(row.prompt_mask)] for row in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise ValueError(f"{what}: the two examples of pair {i // PER_PAIR} have other prompts")
        if chosen.input_ids == rejected.input_ids:
            raise ValueError(f"{what}: the two examples of pair {i // PER_PAIR} are the same")


def _from_choices(row: Mapping[str, Any], template: Template, where: str) -> dict[str, str]:
    """The right answer against one wrong choice, which the row's own text draws: the same in every run."""
    parsed = parse_task_row(row, where, default_task="")
    wrong = [choice for choice in parsed.choices or () if choice != parsed.answer]
    drawn = hashlib.sha256(f"{parsed.id}\n{parsed.prompt}".encode()).digest()
    rejected = wrong[int.from_bytes(drawn[:8], "big") % len(wrong)]
    if template == "chat":
        return {"prompt": parsed.prompt, "chosen": parsed.answer, "rejected": rejected}
    return {
        "prompt": question(parsed, template),
        "chosen": answer_text(parsed.answer, template),
        "rejected": answer_text(rejected, template),
    }


def _encode(row: Mapping[str, Any], tokenizer: Any, template: Template, where: str) -> Coded:
    kinds = {isinstance(row.get(key), list) for key in ("chosen", "rejected")}
    if len(kinds) > 1:
        raise DataError(f"{where}: 'chosen' and 'rejected' must both be texts or both be messages")
    if kinds == {True}:
        return _chat_pair(_conversations(row, where), tokenizer, where)
    if template == "chat":
        before = [{"role": "user", "content": text_of(row, "prompt", where)}]
        chosen, rejected = (
            [{"role": "assistant", "content": text_of(row, key, where)}]
            for key in ("chosen", "rejected")
        )
        return _chat_pair((before, chosen, rejected), tokenizer, where)
    prompt = encode_prompt(tokenizer, text_of(row, "prompt", where))
    tails = []
    for key in ("chosen", "rejected"):
        ids = [*encode_answer(tokenizer, text_of(row, key, where)), end_token(tokenizer)]
        tails.append((ids, [True] * len(ids)))
    return prompt, tails[0], tails[1]


def _conversations(row: Mapping[str, Any], where: str) -> tuple[list[Any], list[Any], list[Any]]:
    """(prompt, chosen, rejected) as messages; what both begin with is the prompt where none is given."""
    prompt = row.get("prompt")
    chosen, rejected = (check_messages(row[key], where) for key in ("chosen", "rejected"))
    if prompt is None:
        same = 0
        while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
            same += 1
        return list(chosen[:same]), list(chosen[same:]), list(rejected[same:])
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": text_of(row, "prompt", where)}]
    if not isinstance(prompt, list) or not all(
        isinstance(message, Mapping)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        for message in prompt
    ):
        raise DataError(f"{where}: 'prompt' must be a text or a list of messages, got {prompt!r}")
    return list(prompt), list(chosen), list(rejected)


def _chat_pair(turns: tuple[list[Any], list[Any], list[Any]], tokenizer: Any, where: str) -> Coded:
    before, *answers = turns
    if not before:
        raise DataError(f"{where}: there is no prompt in front of the two answers")
    coded = []
    for own in answers:
        if not any(message["role"] == "assistant" for message in own):
            raise DataError(
                f"{where}: 'chosen' and 'rejected' must differ in what the assistant says"
            )
        ids, mask = encode_chat(tokenizer, [*before, *own], where)
        start = _first_own(mask, before, where)
        coded.append((ids[:start], (ids[start:], mask[start:])))
    (prompt, chosen), (other, rejected) = coded
    if prompt != other:
        raise DataError(
            f"{where}: the chat template writes the prompt otherwise before the rejected answer"
        )
    return prompt, chosen, rejected


def _first_own(mask: Sequence[bool], before: Sequence[Any], where: str) -> int:
    """Where the first assistant turn behind the prompt starts: earlier turns of the assistant are prompt."""
    starts = [i for i, now in enumerate(mask) if now and not (i and mask[i - 1])]
    earlier = sum(1 for message in before if message["role"] == "assistant")
    if earlier >= len(starts):
        raise DataError(
            f"{where}: the answer cannot be told from the assistant's turn right before it; "
            "put a user message in between"
        )
    return starts[earlier]
