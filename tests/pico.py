"""Tiny random models of every supported family, and a tokenizer that fits them.

Why: tests must run offline on a laptop, so the base models are made here: 2 layers, width 32,
vocabulary 96. The weights are wide enough (std 0.25) that attention is not flat and two prompts
give clearly different logits; biases and norms are random too, so forgetting one shows.
"""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma3", "mistral", "phi3", "gpt2")
VOCAB, WIDTH, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 32, 48, 2, 4, 2, 8
PAD, EOS, BOS, UNK = 0, 1, 2, 3
STD, NORM_STD = 0.25, 0.1
TIED_STD = 0.1  # a tied head echoes the last token if the embeddings are as wide as the rest

_TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
}
_GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 256,
}
_HEAD = {"head_dim": HEAD_DIM}
_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _SIZES | _HEAD),
    "qwen2": (Qwen2Config, _SIZES),
    "qwen3": (Qwen3Config, _SIZES | _HEAD),
    "gemma": (GemmaConfig, _SIZES | _HEAD),
    "gemma3": (
        Gemma3TextConfig,
        _SIZES
        | _HEAD
        | {
            "query_pre_attn_scalar": HEAD_DIM,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": (MistralConfig, _SIZES | _HEAD | {"sliding_window": None}),
    "phi3": (Phi3Config, _SIZES),
    "gpt2": (GPT2Config, _GPT2_SIZES),
}


def pico_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of one family's tiny model; `overrides` replace single fields."""
    if family not in _CONFIGS:
        raise ValueError(f"no pico model of family {family!r}; choose one of {FAMILIES}")
    config_class, sizes = _CONFIGS[family]
    return config_class(**(sizes | _TOKENS | overrides))


def build_pico(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A fresh random model in eval mode. Same arguments, same bits; the global RNG is untouched."""
    config = pico_config(family, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Overwrite every parameter: norms near what the family calls identity, all else N(0, STD)."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.get_input_embeddings() if model.config.tie_word_embeddings else None
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            # Gemma stores norm weights minus one, so its identity is all zeros: keep the centre.
            centre = parameter.detach().clone()
            parameter.copy_(centre + NORM_STD * noise)
        else:
            is_tied = tied is not None and parameter is tied.weight
            parameter.copy_((TIED_STD if is_tied else STD) * noise)


_CHAT_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" + " \n.,:;!?'\"()-_/{}=+*&%"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def pico_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, so text lengths are token counts and any split point is a boundary.

    Never adds special tokens by itself; characters outside the vocabulary become `<unk>`.
    """
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", *_CHAT_ROLES)
    vocab = {token: index for index, token in enumerate((*specials, *_CHARACTERS))}
    if len(vocab) > VOCAB:
        raise ValueError(f"{len(vocab)} tokens do not fit the pico vocabulary of {VOCAB}")
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=list(_CHAT_ROLES),
        chat_template=_CHAT_TEMPLATE,
        model_max_length=256,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
