"""Other people's implementations of what the engine does: PEFT's mixed batch, X-LoRA, Arrow, the mixlora package.

Each reads the adapters that ours reads. What cannot run here is named with the reason and never replaced by a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loramux.bench.rounds import cpu_seconds
from loramux.bench.shape import twin_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOT_HERE = {
    "llama-cpp-python": (
        "llama_cpp",
        "reads GGUF files in place of this base and applies one set of adapters per context, so it has no mixed batch",
    ),
    "vLLM on a CPU": (
        "vllm",
        "brings a torch of its own and runs the model in another process, so it cannot be interleaved with the others",
    ),
}


class Named:
    """A PEFT model whose every call names an adapter per row."""

    def __init__(self, model: Any, names: Sequence[str]):
        self.model, self.names, self.config = model, list(names), model.config

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.model(*args, **options, adapter_names=self.names)


class Recomputed:
    """Decoding without a KV cache: every step runs the whole context. A call gives the seconds of `steps` steps."""

    def __init__(self, model: Any, prompt_BT: torch.Tensor, steps: int):
        self.model, self.prompt_BT, self.steps = model, prompt_BT, steps
        self.mask_BT = torch.ones_like(prompt_BT)

    def step(self, _number: int = 0) -> torch.Tensor:
        out = self.model(self.prompt_BT, attention_mask=self.mask_BT, use_cache=False)
        return out.logits[:, -1:]  # type: ignore[no-any-return]

    def rewind(self, steps: int) -> None:
        """Nothing is kept from step to step."""

    def __call__(self) -> float:
        with torch.no_grad():
            return cpu_seconds(self._timed)

    def _timed(self) -> None:
        for _ in range(self.steps):
            self.step().argmax(-1).tolist()


def peft_mixed(model: PreTrainedModel, folders: Mapping[str, Path], names: Sequence[str]) -> Named:
    """All adapters in one PEFT model, unmerged; row i is answered by names[i]."""
    from peft import PeftModel

    first, *others = dict.fromkeys(names)
    made = PeftModel.from_pretrained(
        twin_of(model), folders[first], adapter_name=first, autocast_adapter_dtype=False
    )
    for name in others:
        made.load_adapter(folders[name], name, autocast_adapter_dtype=False)
    return Named(made.eval(), names)


def peft_xlora(model: PreTrainedModel, folders: Sequence[Path]) -> Any:
    """Gates over frozen adapters, one weight vector per token as X-LoRA defaults to; it refuses a KV cache."""
    from peft import XLoraConfig, get_peft_model

    base = twin_of(model)
    base.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters={str(i): str(folder) for i, folder in enumerate(folders)},
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False).eval()


def peft_arrow(model: PreTrainedModel, folders: Sequence[Path], top_k: int = 2) -> Any:
    """Experts chosen per token by their similarity to the input; the router has no weights to train."""
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in folders]
    config = ArrowConfig(top_k=top_k)
    made = create_arrow_model(twin_of(model), paths, config, autocast_adapter_dtype=False)
    return made.to(torch.bfloat16).eval()


def line_up(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What could be built, and what could not with the reason."""
    made, absent = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "loramux":
                raise  # ours is never absent
            absent[name] = f"{error.name} is not installed"
    return made, absent


def not_here() -> dict[str, str]:
    """Peers that are never timed in this process, with the reason."""
    return {
        name: why if find_spec(module) else f"{module} is not installed"
        for name, (module, why) in NOT_HERE.items()
    }
