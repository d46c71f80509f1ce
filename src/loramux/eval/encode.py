"""Task rows as token ids, tokenised exactly as in training: the question alone, then each answer.

Why here: every kind of evaluation needs it, and an evaluation that tokenises otherwise than the
training did measures something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loramux.eval.ranking import ChoiceRow

if TYPE_CHECKING:
    from loramux.data.tasks import TaskRow
    from loramux.recipe import Template


def encode_text(text: str, tokenizer: Any, template: Template | None) -> list[int]:
    """A user's text as it stands in front of the answer; None takes the text as it is."""
    from loramux.data.encode import encode_answer, encode_prompt
    from loramux.data.tasks import question
    from loramux.errors import DataError

    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template; use a base that has one or another template"
            )
        turns = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself.
        return encode_answer(tokenizer, chat)
    ids = encode_prompt(
        tokenizer, text if template is None else question({"prompt": text}, template)
    )
    if not ids:
        raise DataError(f"the prompt {text!r} has no tokens; give it at least one character")
    return ids


def encode_question(row: TaskRow, tokenizer: Any, template: Template = "task") -> list[int]:
    """The question of a task row, up to where its answer starts."""
    from loramux.data.encode import encode_prompt
    from loramux.data.tasks import question

    if template == "chat":
        return encode_text(row.prompt, tokenizer, template)
    return encode_prompt(tokenizer, question(row, template))


def continuation(answer: str, template: Template = "task") -> str:
    """An answer as it follows the question; the task template puts a space in front."""
    from loramux.data.tasks import answer_text

    return answer if template == "chat" else answer_text(answer, template)


def encode_choices(row: TaskRow, tokenizer: Any, template: Template = "task") -> ChoiceRow:
    """A row with choices, ready to be ranked."""
    from loramux.data.encode import encode_answer

    texts = [continuation(choice, template) for choice in row.choices or ()]
    return ChoiceRow(
        prompt=tuple(encode_question(row, tokenizer, template)),
        choices=tuple(tuple(encode_answer(tokenizer, text)) for text in texts),
        num_bytes=tuple(len(text.encode()) for text in texts),
        task=row.task,
    )
