"""Rows to examples: which of the three row formats a row has, its token ids, and what to do when it is too long.

Why prompt and answer are tokenised apart: at inference the prompt is tokenised alone, and the routing of a
prompt must not depend on how the first letters of its answer would have merged with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from loramux.data.chat import check_messages, encode_chat
from loramux.data.example import Example
from loramux.data.sources import read_rows
from loramux.data.tasks import answer_text, parse_task_row, question, text_of
from loramux.errors import DataError
from loramux.recipe import DataSource, Template, TextTemplate

log = logging.getLogger(__name__)
Coded = tuple[list[int], list[bool]]


def load_examples(
    source: DataSource,
    tokenizer: Any,
    template: Template = "task",
    sequence_len: int = 512,
) -> list[Example]:
    """Every row of the source as an example of at most `sequence_len` tokens.

    Prompts that are too long lose tokens on their left, answers never do; how many rows that hit is logged once.
    """
    examples, num_cut = [], 0
    for row, where, task in read_rows(source):
        ids, mask, cut = encode_row(row, tokenizer, template, sequence_len, where)
        examples.append(Example.build(task, ids, mask))
        num_cut += cut
    if num_cut:
        log.warning(
            "%s: %d of %d rows are longer than sequence_len=%d; their prompts were cut from the left",
            source.path,
            num_cut,
            len(examples),
            sequence_len,
        )
    return examples


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, template: Template, sequence_len: int, where: str
) -> tuple[list[int], list[bool], bool]:
    """(ids, supervised, whether the prompt was cut)."""
    kind = row_format(row, template, where)
    if kind == "messages":
        return _chat(check_messages(row["messages"], where), tokenizer, sequence_len, where)
    if template == "chat":
        answer = text_of(row, "completion" if kind == "completion" else "answer", where)
        turns = [
            {"role": "user", "content": text_of(row, "prompt", where)},
            {"role": "assistant", "content": answer},
        ]
        return _chat(turns, tokenizer, sequence_len, where)
    prompt, answer = _texts(row, kind, template, where)
    ids = encode_prompt(tokenizer, prompt)
    tail = [*encode_answer(tokenizer, answer), end_token(tokenizer)]
    return fit(ids, tail, tokenizer.bos_token_id, sequence_len, where)


def row_format(row: Mapping[str, Any], template: Template, where: str) -> str:
    """ "messages", "completion", "task" or "template", by the keys that are there."""
    if isinstance(template, TextTemplate):
        return "template"
    kinds = [kind for kind, key in _KEYS.items() if row.get(key) is not None]
    if len(kinds) > 1:
        keys = " and ".join(repr(_KEYS[kind]) for kind in kinds)
        raise DataError(f"{where}: has both {keys}; keep the one that is to be learnt")
    if kinds:
        return kinds[0]
    raise DataError(
        f"{where}: keys {sorted(row)} fit no row format; allowed: "
        '{"messages"}, {"prompt", "completion"} or {"prompt", "answer"}, each with a value'
    )


_KEYS = {"messages": "messages", "completion": "completion", "task": "answer"}


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """With the tokenizer's own special tokens in front, but never an end token behind."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token
    if ids and ids[-1] == tokenizer.eos_token_id and not (eos and text.endswith(eos)):
        ids.pop()
    return ids


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so an answer cannot be ended; set eos_token"
        )
    return int(tokenizer.eos_token_id)


def _texts(row: Mapping[str, Any], kind: str, template: Template, where: str) -> tuple[str, str]:
    if kind == "completion":
        return text_of(row, "prompt", where), text_of(row, "completion", where)
    if kind == "task":
        parsed = parse_task_row(row, where, default_task="")
        return question(parsed, template), answer_text(parsed.answer, template)
    assert isinstance(template, TextTemplate)
    fields = template.fields()
    missing = [name for name in fields if name not in row]
    if missing:
        raise DataError(f"{where}: the template needs {missing}, the row has {sorted(row)}")
    checked = {name: text_of(row, name, where) for name in fields}
    return template.fill_prompt(checked), template.fill_completion(checked)


def _chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, sequence_len: int, where: str
) -> tuple[list[int], list[bool], bool]:
    """A conversation that is too long first loses its oldest exchanges, then prompt tokens."""
    kept = list(messages)
    ids, mask = encode_chat(tokenizer, kept, where)
    was_cut = len(ids) > sequence_len
    while len(ids) > sequence_len and (shorter := _without_oldest(kept)):
        kept = shorter
        ids, mask = encode_chat(tokenizer, kept, where)
    start = mask.index(True)
    head, tail = ids[:start], ids[start:]
    ids, fitted, _ = fit(head, tail, tokenizer.bos_token_id, sequence_len, where)
    return ids, fitted[: len(ids) - len(tail)] + mask[start:], was_cut


def _without_oldest(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """Drop everything up to the second user turn, keeping a system message in front."""
    system = [m for m in messages[:1] if m["role"] == "system"]
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    if len(users) < 2 or not any(m["role"] == "assistant" for m in messages[users[1] :]):
        return None
    return system + list(messages[users[1] :])


def fit(
    prompt: list[int], answer: list[int], bos: int | None, sequence_len: int, where: str
) -> tuple[list[int], list[bool], bool]:
    """(ids of both, supervised, whether the prompt was cut): a prompt that is too long loses tokens on its left."""
    if not prompt:
        raise DataError(f"{where}: the prompt has no tokens")
    room = sequence_len - len(answer)
    keeps_bos = prompt[0] == bos and bos is not None
    if room < 1 + keeps_bos:
        raise DataError(
            f"{where}: the answer has {len(answer)} tokens, which leaves no room for a prompt in "
            f"sequence_len={sequence_len}; raise it or drop the row"
        )
    was_cut = len(prompt) > room
    if was_cut:
        front = prompt[:1] if keeps_bos else []
        prompt = front + prompt[len(prompt) - room + len(front) :]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer), was_cut
