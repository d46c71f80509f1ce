"""Conversations through the tokenizer's own chat template, with the assistant's turns supervised.

Why prefixes: most templates do not mark what the assistant says. Rendering the conversation up to each turn shows
where it starts and ends, but only if the template never rewrites earlier turns, which is checked.
The pieces between those points are tokenised one by one: that is how the prompt is tokenised at inference too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, Any]


def check_messages(value: Any, where: str) -> list[Message]:
    """A list of {"role", "content"} with at least one assistant turn that has something before it."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a non-empty list, got {value!r}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise DataError(f"{where}: message {i} needs a 'role' out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: message {i} needs a text 'content', got {message.get('content')!r}"
            )
    if not any(message["role"] == "assistant" and message["content"].strip() for message in value):
        raise DataError(f"{where}: no assistant message with a text, so there is nothing to learn")
    return value


def encode_chat(
    tokenizer: Any, messages: Sequence[Message], where: str
) -> tuple[list[int], list[bool]]:
    """Token ids of the conversation and which of them the assistant produced (its end token included)."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError(
            f"{where}: the tokenizer has no chat template; "
            "use a tokenizer that has one or rows with 'prompt' and 'completion'"
        )
    if "generation %}" in str(template) or "generation -%}" in str(template):
        ids, mask = _from_markers(tokenizer, messages, where)
    else:
        ids, mask = _from_prefixes(tokenizer, messages, where)
    if True not in mask:
        raise DataError(f"{where}: the chat template left no assistant token to learn from")
    if mask[0]:
        raise DataError(f"{where}: the conversation starts with the assistant; add a user message")
    return ids, mask


def _from_markers(
    tokenizer: Any, messages: Sequence[Message], where: str
) -> tuple[list[int], list[bool]]:
    """The template says itself what the assistant generates."""
    coded = _apply(
        tokenizer,
        messages,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(coded["input_ids"]), [bool(flag) for flag in coded["assistant_masks"]]


def _from_prefixes(
    tokenizer: Any, messages: Sequence[Message], where: str
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    mask: list[bool] = []
    for text, supervised in split_turns(tokenizer, messages, where):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [supervised] * len(piece)
    return ids, mask


def split_turns(tokenizer: Any, messages: Sequence[Message], where: str) -> list[tuple[str, bool]]:
    """The rendered conversation as (text, supervised) pieces, in order."""
    full = _render(tokenizer, messages, where)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], where, add_generation_prompt=True) if i else ""
        after = _render(tokenizer, messages[: i + 1], where)
        if len(before) < at or not after.startswith(before) or not full.startswith(after):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns (seen at message {i}), so the "
                "assistant's text cannot be located; use one row per assistant turn or a template "
                "with {% generation %} markers"
            )
        end = len(before) + _spoken(after[len(before) :], tokenizer.eos_token)
        pieces += [(full[at : len(before)], False), (full[len(before) : end], True)]
        at = end
    pieces.append((full[at:], False))
    return [(text, supervised) for text, supervised in pieces if text]


def _spoken(text: str, eos_token: str | None) -> int:
    """Length of what the model itself must produce: line breaks after the end token are layout."""
    if eos_token and text.rstrip().endswith(eos_token):
        return len(text.rstrip())
    return len(text)


def _render(
    tokenizer: Any, messages: Sequence[Message], where: str, add_generation_prompt: bool = False
) -> str:
    return str(
        _apply(
            tokenizer,
            messages,
            where,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def _apply(tokenizer: Any, messages: Sequence[Message], where: str, **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], **options)
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from None
