"""Answers to prompts: the library side of `loramux generate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loramux.recipe import Template


def generate(
    base: str | Path,
    adapter: str | Path | None = None,
    prompts: Sequence[str] = (),
    max_tokens: int = 64,
    chat: bool = False,
    template: Template | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    threads: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """Load a base (and an adapter) and continue every prompt; greedy unless a temperature is given.

    Returns {"results": [{"prompt", "text", "tokens"}], "base", "adapter", "seconds"}; `tokens` are the
    ids of the continuation without its end token. The prompt is taken as it is unless `chat` or a
    template (`task`: "Question: ...\\nAnswer:") is asked for. `task` names the task to adapters that go by tasks.
    """
    from loramux.errors import LoramuxError
    from loramux.eval.loading import load_model

    start = time.perf_counter()
    if not prompts:
        raise LoramuxError("no prompt was given; pass at least one")
    if chat and template not in (None, "chat"):
        raise LoramuxError(f"chat and template={template!r} exclude each other; give one of them")
    loaded = load_model(base, adapter, dtype=dtype, threads=threads)
    results = generate_model(
        loaded.model,
        loaded.tokenizer,
        prompts,
        max_tokens=max_tokens,
        template="chat" if chat else template,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        task=task,
    )
    return {
        "results": results,
        "base": str(base),
        "adapter": None if adapter is None else str(adapter),
        "seconds": round(time.perf_counter() - start, 3),
    }


def generate_model(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 64,
    template: Template | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    first_line_only: bool = False,
    task: str | None = None,
) -> list[dict[str, Any]]:
    """The results of `generate` for a model that is already there, in the order of the prompts."""
    from loramux.eval.encode import encode_text
    from loramux.eval.generation import greedy
    from loramux.eval.run import check_length

    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    options = _sampling(temperature, top_p, seed)
    coded = [encode_text(prompt, tokenizer, template) for prompt in prompts]
    check_length(model, {p: len(c) + max_tokens for p, c in zip(prompts, coded, strict=True)})
    results = []
    for at in range(0, len(coded), batch_size):
        part = coded[at : at + batch_size]
        made = greedy(
            model,
            tokenizer,
            part,
            max_new_tokens=max_tokens,
            first_line_only=first_line_only,
            tasks=None if task is None else [task] * len(part),
            **options,
        )
        for prompt, tokens in zip(prompts[at : at + batch_size], made, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            results.append({"prompt": prompt, "text": text, "tokens": tokens})
    return results


def _sampling(temperature: float | None, top_p: float | None, seed: int) -> dict[str, Any]:
    """Options for `model.generate`; a given temperature turns sampling on."""
    if temperature is None:
        if top_p is not None:
            raise ValueError("top_p needs a temperature; without one decoding is greedy")
        return {}
    if temperature <= 0 or not 0 < (1.0 if top_p is None else top_p) <= 1:
        raise ValueError(
            f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}"
        )
    import torch

    torch.manual_seed(seed)
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}
