"""From a body to what the engine is asked: prompts as token ids, sampling parameters, every cap checked on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from loramux.engine.request import SamplingParams
from loramux.server.bodies import ChatBody, CompletionBody, SamplingBody
from loramux.server.config import LimitsConfig
from loramux.server.errors import ApiError

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions


def refuse(message: str, param: str, code: str = "invalid_value") -> ApiError:
    return ApiError(message, code=code, param=param)


def model_of(body: SamplingBody, base_name: str) -> str:
    """What the caller chose, whichever of the three fields says it."""
    given = [text for text in (body.adapter_id, body.lora_path) if text is not None]
    if body.model is not None and body.model not in (base_name, "base"):
        given.append(body.model)
    if len(set(given)) > 1:
        raise refuse("model, adapter_id and lora_path name different adapters", "model")
    if given:
        return given[0]
    if body.model is None:
        raise refuse("model is missing", "model", "missing_parameter")
    return body.model


def check_size(texts: Iterable[str], limits: LimitsConfig, param: str) -> int:
    """Characters of the texts; tokenising more than the limit would take too long to find it too much."""
    total = sum(len(text) for text in texts)
    if total > limits.max_prompt_chars:
        raise refuse(f"{param}: at most {limits.max_prompt_chars} characters", param, "too_large")
    return total


# --- Prompts ----------------------------------------------------------------------------------------


def chat_prompt(tokenizer: Any, body: ChatBody, limits: LimitsConfig) -> tuple[str, list[int]]:
    """(the last user's words, for retrieval; token ids by the tokenizer's chat template)."""
    if len(body.messages) > limits.max_messages:
        raise refuse(f"messages: at most {limits.max_messages}", "messages")
    messages = [message.plain(place) for place, message in enumerate(body.messages)]
    if getattr(tokenizer, "chat_template", None) is None:
        raise refuse(
            "the base has no chat template; use /v1/completions", "messages", "no_chat_template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like about turns they do not take
        if type(error).__module__.partition(".")[0] not in ("jinja2", "builtins", "transformers"):
            raise
        raise refuse(
            "the base's chat template does not take these turns: their roles or their order",
            "messages", "invalid_messages",
        ) from None  # fmt: skip
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), text)
    return asked, ids


def completion_prompts(
    tokenizer: Any, body: CompletionBody, limits: LimitsConfig
) -> tuple[str | None, list[list[int]]]:
    """(the prompt's words for retrieval, None if there are several; token ids of each prompt)."""
    given = body.prompt
    if isinstance(given, str):
        prompts: list[Any] = [given]
    elif given and isinstance(given[0], int):
        prompts = [given]
    else:
        prompts = list(given)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise refuse("prompt: every prompt needs at least one token", "prompt")
    if len(prompts) > limits.max_prompts:
        raise refuse(f"prompt: at most {limits.max_prompts} in one call", "prompt")
    ids = [list(tokenizer(p)["input_ids"]) if isinstance(p, str) else list(p) for p in prompts]
    if not all(ids):
        raise refuse("prompt: every prompt needs at least one token", "prompt")
    first = prompts[0]
    if len(prompts) > 1:
        return None, ids
    return first if isinstance(first, str) else str(tokenizer.decode(first)), ids


# --- Sampling ---------------------------------------------------------------------------------------


def chat_params(body: ChatBody, limits: LimitsConfig) -> SamplingParams:
    """Without max_tokens the default is `limits.default_max_tokens`, or what the model has room for."""
    tokens = body.max_completion_tokens
    if tokens is not None and body.max_tokens is not None and tokens != body.max_tokens:
        raise refuse("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    tokens = body.max_tokens if tokens is None else tokens
    if body.top_logprobs and not body.logprobs:
        raise refuse("top_logprobs needs logprobs=true", "top_logprobs")
    wanted = (body.top_logprobs or 0) if body.logprobs else None
    if wanted is not None and wanted > limits.max_logprobs:
        raise refuse(f"top_logprobs: at most {limits.max_logprobs}, got {wanted}", "top_logprobs")
    return _params(body, limits, limits.default_max_tokens if tokens is None else tokens, wanted)


def completion_params(body: CompletionBody, limits: LimitsConfig) -> SamplingParams:
    """`echo` with logprobs asks for those of the prompt; max_tokens 0 is allowed with echo only."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refuse("best_of is not supported", "best_of", "unsupported_parameter")
    tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if tokens == 0 and not body.echo:
        raise refuse("max_tokens 0 needs echo=true", "max_tokens")
    if body.echo and body.logprobs is not None and body.stream:
        raise refuse(
            "logprobs of an echoed prompt cannot be streamed", "stream", "unsupported_parameter"
        )
    params = _params(body, limits, max(tokens, 1), body.logprobs)
    if body.echo and body.logprobs is not None:
        return replace(params, prompt_logprobs=body.logprobs)
    return params


def _params(
    body: SamplingBody, limits: LimitsConfig, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    _check_caps(body, limits, max_tokens, logprobs)
    top_k = 0 if body.top_k is None else max(body.top_k, 0)  # -1 is vLLM's "off"
    if max_tokens < 1:  # of a chat; a completion that echoes asks for one token that is not shown
        raise refuse(f"max_tokens: at least 1, got {max_tokens}", "max_tokens")
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=top_k,
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
            n=body.n or 1,
            stop=body.stops,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            logprobs=logprobs,
        )
    except ValueError as error:  # its text begins with the field, and says its range
        field = str(error).partition(" ")[0]
        param = field if field in type(body).model_fields else None
        raise ApiError(str(error), code="invalid_value", param=param) from None


def _check_caps(
    body: SamplingBody, limits: LimitsConfig, max_tokens: int, logprobs: int | None
) -> None:
    if max_tokens > limits.max_tokens:
        raise refuse(f"max_tokens: at most {limits.max_tokens}, got {max_tokens}", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise refuse("stream_options needs stream=true", "stream_options")
    if (body.n or 1) > limits.max_n:
        raise refuse(f"n: at most {limits.max_n}, got {body.n}", "n")
    if logprobs is not None and logprobs > limits.max_logprobs:
        raise refuse(f"logprobs: at most {limits.max_logprobs}, got {logprobs}", "logprobs")
    stops = body.stops
    if len(stops) > limits.max_stop or any(len(text) > limits.max_stop_chars for text in stops):
        raise refuse(
            f"stop: at most {limits.max_stop} texts of at most {limits.max_stop_chars} characters",
            "stop",
        )
    if not all(stops):
        raise refuse("stop: texts must not be empty", "stop")


def fit(
    prompts: Sequence[Sequence[int]], params: SamplingParams, longest: int | None, is_default: bool
) -> SamplingParams:
    """Check the model's positions before anything is admitted; a default of max_tokens shrinks to what is left."""
    if longest is None:
        return params
    most = max(len(prompt) for prompt in prompts)
    if most + params.max_tokens <= longest:
        return params
    if is_default and most < longest:
        return replace(params, max_tokens=longest - most)
    raise refuse(
        f"a prompt of {most} tokens and max_tokens {params.max_tokens} exceed the model's {longest} positions; "
        "shorten the prompt or lower max_tokens",
        "max_tokens", "context_length_exceeded",
    )  # fmt: skip
