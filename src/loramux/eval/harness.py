"""`loramux` models for lm-evaluation-harness: a base with an adapter attached.

    python -m loramux.eval.harness run --model loramux \\
        --model_args pretrained=BASE,adapter=DIR --tasks arc_easy

is `lm-eval` with the model registered; in Python, importing this module registers it. `peft=` and
`lora_local_path=` are other spellings of `adapter=`; all other arguments are those of the `hf` model.

Why likelihoods are not left to `hf`: a mixture may route on the prompt, so the context has to be
marked as such, and two requests may share tokens but not the place where the context ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loramux.errors import LoramuxError, require
from loramux.eval.generation import pad_token
from loramux.eval.ranking import ChoiceRow, choice_scores

require("lm_eval", "eval", "The model for lm-evaluation-harness")

from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

ADAPTER_NAMES = ("adapter", "peft", "lora_local_path")
AUTO_BATCH = 16
Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("loramux")
class LoramuxLM(HFLM):
    """A transformers model with a loramux adapter; without `adapter` it is the plain base.

    An already attached model is taken too: `LoramuxLM(model, tokenizer=tokenizer)`.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | Path | None = None,
        peft: str | None = None,
        lora_local_path: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        import torch

        folder = _one_adapter(adapter, peft, lora_local_path)
        if isinstance(pretrained, str):
            from loramux.fetch import resolve_base

            pretrained = str(resolve_base(pretrained))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, **options)
        if folder is not None:
            import loramux

            loramux.load(self.model, folder)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of every continuation.

        Continuations of one context are scored together, so the context is computed and routed once.
        """
        from tqdm import tqdm

        groups: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (_, context, answer) in enumerate(requests):
            fitted, continuation = self._fit(context, answer)
            groups.setdefault(fitted, {}).setdefault(continuation, []).append(i)
        rows = [
            ChoiceRow(context, tuple(answers), (1,) * len(answers))
            for context, answers in groups.items()
        ]
        order = sorted(range(len(rows)), key=lambda r: -rows[r].num_tokens)
        size = override_bs or self.batch_size
        size = AUTO_BATCH if size == "auto" else int(size)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=quiet, desc="Scoring continuations") as bar:
            for start in range(0, len(order), size):
                part = [rows[r] for r in order[start : start + size]]
                scored = choice_scores(self.model, part, pad_token_id=pad_token(self.tokenizer))
                for scores in scored:
                    places = groups[scores.row.prompt]
                    for c, continuation in enumerate(scores.row.choices):
                        for i in places[continuation]:
                            results[i] = (scores.sums[c], scores.greedy[c])
                            bar.update()
        self._remember(requests, results)
        return results

    def _fit(
        self, context: list[int], answer: list[int]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut the context from the left to what the model can read; the last token is not an input."""
        if not 0 < len(answer) <= self.max_length:
            raise LoramuxError(
                f"a continuation of {len(answer)} tokens does not fit into the {self.max_length} "
                "positions of the model"
            )
        return tuple(context[-(self.max_length + 1 - len(answer)) :]), tuple(answer)

    def _remember(self, requests: Sequence[Request], results: list[tuple[float, bool]]) -> None:
        """Hand the answers to the harness's cache; rolling windows have no text to file them under."""
        for (text, _, _), result in zip(requests, results, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)


def _one_adapter(*given: str | Path | None) -> str | None:
    named = {n: str(v) for n, v in zip(ADAPTER_NAMES, given, strict=True) if v is not None}
    if len(named) > 1:
        raise LoramuxError(f"{' and '.join(named)} name the adapter twice; keep one of them")
    for name, folder in named.items():
        if not Path(folder).is_dir():
            raise LoramuxError(
                f"{name}={folder!r} is not a folder; give the folder of a saved adapter"
            )
        return folder
    return None


def main() -> None:
    """`lm-eval` with `--model loramux`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
