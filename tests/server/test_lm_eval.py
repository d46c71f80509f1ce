"""lm-evaluation-harness' stock `local-completions` client scores and generates through a real server.

What it needs: echo with log-probabilities of prompts given as token ids, several in one call.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from engine.helpers import merged, plain_logits, write_peft
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.server.app import create_app
from loramux.server.services import Services
from pico import build_pico, pico_tokenizer
from server.rig import FolderRegistry, config, running

PAIRS = [("hello", " you"), ("a longer context here", "x"), ("and", "then some")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(URL, folder of the adapter law, folder of the tokenizer)."""
    home = tmp_path_factory.mktemp("harness")
    folder = write_peft(home / "law", seed=1)
    pico_tokenizer().save_pretrained(str(home / "tokenizer"))
    registry = FolderRegistry()
    registry.add_folder("local", "law", folder)
    engine = Engine(build_pico("llama"), pico_tokenizer(), kv_memory="4MiB", fuse=False)
    services = Services(
        engine=AsyncEngine(engine), registry=registry, tokenizer=pico_tokenizer(),
        max_length=engine.max_length,
    )  # fmt: skip
    with running(create_app(config(), services)) as url:
        yield url, folder, home / "tokenizer"


def harness(served: Any, model: str, **options: Any) -> Any:
    url, _, tokenizer = served
    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=model, tokenizer=str(tokenizer),
        tokenizer_backend="huggingface", max_length=200, **options,
    )  # fmt: skip


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, each, place) for place, each in enumerate(arguments)]


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 3}, {"tokenized_requests": False}]
)
def test_loglikelihoods_are_those_of_the_adapters_merged_weights(served, options):
    client = harness(served, "law", **options)
    found = client.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    model, tokenizer = merged({served[1]: 1.0}), pico_tokenizer()
    for (context, ending), (said, is_greedy) in zip(PAIRS, found, strict=True):
        # lm-eval moves blanks from the end of a context to the start of the ending.
        start = tokenizer(context)["input_ids"]
        tokens = start + tokenizer(ending)["input_ids"]
        logs = plain_logits(model, tokens, len(start)).log_softmax(-1)
        picked = [logs[i][token].item() for i, token in enumerate(tokens[len(start) :])]
        assert math.isclose(said, sum(picked), abs_tol=1e-3)
        best = [int(logs[i].argmax()) for i in range(len(picked))]
        assert is_greedy == (best == tokens[len(start) :])


def test_texts_are_generated_until_their_stop(served):
    client = harness(served, "pico")
    asked = [
        ("hello", {"until": ["\n"], "max_gen_toks": 8}),
        ("abc", {"until": ["\n"], "max_gen_toks": 4}),
    ]
    found = client.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert len(found) == 2 and all("\n" not in text for text in found)


@pytest.mark.skipif(
    "LORAMUX_FUZZ_EXAMPLES" not in os.environ, reason="half a minute: `make fuzz` runs it"
)
def test_a_whole_task_runs_through_it(served, tmp_path: Path):
    rows = [
        {"question": f"{word} is", "choices": ["a", "b"], "answer": place % 2}
        for place, word in enumerate("xyz")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "tiny_choice", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": {"train": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    done = lm_eval.simple_evaluate(model=harness(served, "law"), tasks=[task], bootstrap_iters=0)
    assert done["results"]["tiny_choice"]["acc,none"] in [
        pytest.approx(hits / 3) for hits in range(4)
    ]
