"""What is timed: the shape of the base, how often, and the base itself with random weights or from a folder.

Why random weights: speed does not depend on them, and no download is needed. Every variant gets its own copy of the
weights, as it would have in a process of its own; what the place in memory makes of it, the control shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes."""

    name: str
    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int


SMOL = Shape("SmolLM2-135M", layers=30, width=576, inner=1536, heads=9, kv_heads=3, vocab=49152)
SMALL = Shape(
    "SmolLM2-135M cut to 2 layers", layers=2, width=576, inner=1536, heads=9, kv_heads=3, vocab=4096
)


@dataclass(frozen=True)
class Effort:
    """How much is measured. Rounds are paired; a decode round is `steps` steps after one that is not timed.

    close_rounds: rounds of single steps for the pair that differs by about a percent, see decode.close_rows.
    engine_shapes: (requests, context) of decoding batches; mixed: so many requests of each of four kinds.
    residency: how many adapters are resident. streams: requests that are answered at a time while serving.
    """

    shape: Shape
    decode_rounds: int
    close_rounds: int
    load_rounds: int
    train_rounds: int
    memory_runs: int
    is_quick: bool = False
    steps: int = 4
    context: int = 128
    batches: tuple[int, ...] = (1, 8)
    train_batch: int = 8
    train_length: int = 128
    engine_rounds: int = 60
    engine_shapes: tuple[tuple[int, int], ...] = ((1, 128), (8, 128), (32, 32))
    prefill_rounds: int = 40
    prefill_shape: tuple[int, int] = (8, 128)
    mixed: int = 8
    mixed_context: int = 32
    slot_rounds: int = 60
    residency: tuple[int, ...] = (1, 10, 100, 1000)
    serve_rounds: int = 6
    open_rounds: int = 3
    serve_requests: int = 32
    serve_adapters: int = 64
    serve_slots: int = 32
    serve_prompt: tuple[int, int] = (32, 256)
    serve_answer: tuple[int, int] = (16, 128)
    streams: int = 8
    score_rounds: int = 5
    score_layers: tuple[int, ...] = (12,)
    joint_rounds: int = 7
    joint_runs: int = 1
    joint_steps: int = 60

    def at_most(self, rounds: int) -> Effort:
        """The same with no more than so many rounds of anything. Raises ValueError below 3: no interval comes of it."""
        if rounds < 3:
            raise ValueError(f"rounds must be at least 3, got {rounds}")
        names = [f.name for f in fields(self) if f.name.endswith("_rounds")]
        return replace(self, **{name: min(getattr(self, name), rounds) for name in names})


FULL = Effort(
    SMOL, decode_rounds=60, close_rounds=1000, load_rounds=30, train_rounds=30, memory_runs=3
)
QUICK = Effort(
    SMALL,
    decode_rounds=7,
    close_rounds=20,
    load_rounds=3,
    train_rounds=3,
    memory_runs=1,
    is_quick=True,
    steps=2,
    train_length=32,
    engine_rounds=6,
    prefill_rounds=6,
    slot_rounds=6,
    residency=(1, 8, 32),
    score_rounds=3,
    joint_rounds=3,
    joint_steps=3,
    serve_rounds=2,
    open_rounds=1,
    serve_requests=12,
    serve_adapters=8,
    serve_slots=4,
    serve_prompt=(8, 32),
    serve_answer=(4, 16),
)


def build_base(shape: Shape, folder: str | None = None, seed: int = 0) -> PreTrainedModel:
    """A bf16 model in eval mode; `folder` (a checkpoint) replaces the shape."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model.eval()  # type: ignore[no-any-return]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()  # type: ignore[no-any-return]


def copy_of(model: PreTrainedModel) -> Any:
    """The same weights in other memory."""
    return copy.deepcopy(model)


def twin_of(model: PreTrainedModel) -> Any:
    """Another model over the very same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
