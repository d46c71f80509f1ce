"""What inference calls may say. Fields are OpenAI's, then the further sampling fields that vLLM takes.

A field that would change the answer and is not supported is refused; those in IGNORED have no meaning here and are
accepted, since clients send them by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from loramux.server.errors import ApiError

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls"),
    }
)
# What a field may say although it is not supported: it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "use_beam_search": (None, False),
    # vLLM's: what its clients send by themselves is what it does without them.
    "length_penalty": (None, 1, 1.0),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "add_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "detokenize": (None, True),
    "priority": (None, 0),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "logits_processors": (None, []),
    "return_tokens_as_token_ids": (None, False),
    "return_token_ids": (None, False),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_decoding_backend": (None,),
}
# The same, of chats only.
NEUTRAL_OF_CHATS: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_special_tokens": (None, False),
    "documents": (None, []),
}
_MESSAGE_EXTRAS = frozenset(
    {"name", "refusal", "audio", "function_call", "tool_calls", "annotations", "reasoning_content"}
)


def _whole_characters(text: str) -> str:
    """JSON can say half of a surrogate pair, which no encoding and no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Model = Annotated[
    str, StringConstraints(min_length=1, max_length=2048), AfterValidator(_whole_characters)
]
Token = Annotated[int, Field(ge=0, lt=2**31)]


def _described(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = False
    ignored = {name: {"description": "has no meaning here"} for name in sorted(IGNORED)}
    schema["properties"] = {**schema["properties"], **ignored}


class _Body(BaseModel):
    # Unknown keys are looked at by `check_extras`, which knows why each of them is refused.
    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_described)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    def check_extras(self) -> None:
        """Refuse what is not supported, by name; keep what has no meaning here."""
        for name, value in (self.model_extra or {}).items():
            if name in IGNORED or (name in self.neutral and value in self.neutral[name]):
                continue
            if name in self.neutral:
                raise ApiError(
                    f"{name!r} is not supported by this server; leave it out",
                    code="unsupported_parameter", param=name,
                )  # fmt: skip
            close = get_close_matches(name[:80], type(self).model_fields, n=1)
            raise ApiError(
                f"unknown parameter {name[:80]!r}; "
                + (f"did you mean {close[0]!r}?" if close else "remove it"),
                code="unknown_parameter",
                param=name[:80],
            )


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class SamplingBody(_Body):
    """Fields of both inference calls."""

    model: Model | None = Field(None, description="base, adapter, mix, router:NAME or auto")
    adapter_id: Model | None = Field(None, description="another spelling of an adapter in `model`")
    lora_path: Model | None = Field(None, description="another spelling of an adapter in `model`")
    max_tokens: int | None = Field(
        None, ge=0, le=2**31, description="new tokens of one sample at most"
    )
    min_tokens: int = Field(0, ge=0, le=2**31, description="no stop before so many")
    temperature: float | None = Field(
        None, ge=0, le=2, description="1 without it; 0: the likeliest token each time"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the likeliest tokens that make up this share"
    )
    top_k: int | None = Field(
        None, ge=-1, le=2**31, description="draw from so many of the likeliest tokens; 0 or -1: all"
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="least probability, as a share of the likeliest"
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="divides the logits of tokens that were there, the prompt's too; 1: none",
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="taken from the logits of tokens that were generated"
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="the same, times how often they were"
    )
    seed: int | None = Field(
        None, ge=0, le=2**62, description="the same seed draws the same tokens"
    )
    n: int | None = Field(None, ge=1, le=2**31, description="samples of each prompt; 1 without it")
    stop: Text | list[Text] | None = Field(
        None, description="texts that end an answer; they are not in it"
    )
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = Field(
        None, description="tokens that end an answer"
    )
    ignore_eos: bool = Field(False, description="go on after the end token")
    stream: bool | None = Field(None, description="chunks as server-sent events")
    stream_options: StreamOptions | None = Field(
        None, description="include_usage: a last chunk with the usage"
    )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn. Roles of tools are refused, and so is any part that is not text."""

    model_config = ConfigDict(
        strict=True, extra="allow", json_schema_extra={"additionalProperties": False}
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """All parts as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def plain(self, place: int) -> dict[str, str]:
        """As a chat template takes it."""
        for name, value in (self.model_extra or {}).items():
            if name not in _MESSAGE_EXTRAS or (value not in (None, [], "") and name != "name"):
                raise ApiError(
                    f"messages.{place}.{name[:80]} is not supported; leave it out",
                    code="unsupported_parameter", param=f"messages.{place}.{name[:80]}",
                )  # fmt: skip
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {**NEUTRAL, **NEUTRAL_OF_CHATS}
    messages: list[Message] = Field(
        min_length=1, description="the turns: role and content (a text, or parts of type text)"
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="another name of max_tokens"
    )
    logprobs: bool | None = Field(None, description="log-probabilities of the chosen tokens")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=2**31,
        description="so many of the likeliest tokens at each place; needs logprobs",
    )


class CompletionBody(SamplingBody):
    """POST /v1/completions. `prompt`: a text, token ids, or a list of either."""

    prompt: Text | list[Token] | list[Text] | list[list[Token]] = Field(
        description="a text, token ids, or a list of either"
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=2**31,
        description="log-probabilities, and so many of the likeliest tokens at each place",
    )
    echo: bool | None = Field(
        None, description="the prompt before the answer; with logprobs those of its tokens too"
    )
    best_of: int | None = Field(
        None, ge=1, le=2**31, description="not supported unless it equals n"
    )


class EmbeddingBody(_Body):
    """POST /v1/embeddings."""

    model: Model = Field(description="minilm")
    input: Text | list[Text] = Field(description="a text, or up to 256 of them")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="base64: little-endian float32"
    )
    dimensions: int | None = Field(None, ge=1, le=2**31, description="not supported")
