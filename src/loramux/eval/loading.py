"""A base model, its tokenizer and perhaps an adapter, ready to run.

Why here: evaluation and generation start alike, and both want the same clear errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Loaded:
    """A base with its tokenizer; `handle` is None where no adapter was asked for."""

    model: Any
    tokenizer: Any
    handle: Any


def load_model(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    dtype: str | None = None,
    threads: int | None = None,
) -> Loaded:
    """The base in eval mode, in its own dtype unless one is given, with the adapter attached.

    `base` is a folder, a hub id or a name that `loramux fetch` knows; `threads` holds for the process.
    """
    from loramux.errors import LoramuxError, suggest

    if dtype is not None and dtype not in DTYPES:
        raise LoramuxError(f"unknown dtype {dtype!r}; {suggest(dtype, DTYPES)}")
    if threads is not None and threads < 1:
        raise LoramuxError(f"threads must be at least 1, got {threads}")
    if adapter is not None and not Path(adapter).is_dir():
        raise LoramuxError(
            f"no adapter folder at {str(adapter)!r}; give the folder of a saved adapter"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loramux.fetch import reading_base, resolve_base

    folder = resolve_base(str(base))

    if threads is not None:
        torch.set_num_threads(threads)
    chosen = "auto" if dtype is None else getattr(torch, dtype)
    with reading_base(base):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen).eval()
    handle = None
    if adapter is not None:
        import loramux

        handle = loramux.load(model, str(adapter))
    return Loaded(model, tokenizer, handle)
