"""The official `openai` client, sync and async, against a real server over a pico engine."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from engine.helpers import merged, plain_logits, write_peft
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.server.app import create_app
from loramux.server.services import Services
from pico import build_pico, pico_tokenizer
from server.rig import FolderRegistry, config, running

ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running server with the adapters law and tone, and what it is made of."""
    home = tmp_path_factory.mktemp("served")
    registry = FolderRegistry()
    folders: dict[str, Path] = {}
    for place, name in enumerate(("law", "tone")):
        folders[name] = write_peft(home / name, seed=place + 1)
        registry.add_folder("local", name, folders[name])
    engine = Engine(build_pico("llama"), pico_tokenizer(), kv_memory="4MiB", fuse=False)
    services = Services(
        engine=AsyncEngine(engine), registry=registry, tokenizer=pico_tokenizer(),
        max_length=engine.max_length,
    )  # fmt: skip
    with running(create_app(config(), services)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield SimpleNamespace(
            url=url, client=client, folders=folders, registry=registry, engine=engine
        )
        client.close()


def text_of(tokens: list[int]) -> str:
    return str(pico_tokenizer().decode(tokens, skip_special_tokens=True))


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(plain_logits(model, tokens, len(tokens))[0].argmax()))
    return tokens[len(prompt) :]


def test_chat_answers_with_the_chat_template_and_the_base(served):
    done = served.client.chat.completions.create(
        model="pico",
        messages=ASKED,
        temperature=0,
        max_completion_tokens=5,
        extra_body={"ignore_eos": True},
    )
    tokenizer = pico_tokenizer()
    prompt = tokenizer("<|user|>hello<|assistant|>")["input_ids"]
    assert done.choices[0].message.content == text_of(greedy(build_pico("llama"), prompt, 5))
    assert done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens == len(prompt)
    assert done.usage.total_tokens == len(prompt) + 5
    assert done.model == "pico" and done.object == "chat.completion"


@pytest.mark.parametrize(
    ("model", "mix"),
    [
        ("law", {"law": 1.0}),
        ("pico:tone@1", {"tone": 1.0}),
        ("law*0.7+local/tone*0.3", {"law": 0.7, "tone": 0.3}),
    ],
)
def test_an_adapter_and_a_mix_answer_as_their_merged_weights_do(served, model, mix):
    done = served.client.completions.create(
        model=model, prompt="abc", temperature=0, max_tokens=6, extra_body={"ignore_eos": True}
    )
    twin = merged({served.folders[name]: weight for name, weight in mix.items()})
    prompt = pico_tokenizer()("abc")["input_ids"]
    assert done.choices[0].text == text_of(greedy(twin, prompt, 6))
    parts = done.model_extra["loramux"]["adapters"]
    assert [(part["ref"].split("/")[1].split("@")[0], part["weight"]) for part in parts] == list(
        mix.items()
    )


def test_a_stream_says_what_the_whole_answer_says_and_ends_with_usage(served):
    asked: dict[str, Any] = {
        "model": "law", "messages": ASKED, "temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = served.client.chat.completions.create(**asked)
    chunks = list(
        served.client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    with_books = [c for c in chunks if "loramux" in (c.model_extra or {})]
    assert len(with_books) == 1 and with_books[0].choices[0].finish_reason == "length"


def test_samples_seeds_and_stops_are_openais(served):
    asked: dict[str, Any] = {
        "model": "tone", "prompt": "abc", "temperature": 1.0, "max_tokens": 12, "n": 3, "seed": 7,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    one, two = (served.client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices] and len(set(texts)) == 3
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert one.usage.completion_tokens == 36
    stop = texts[0][4:6]
    for given in (stop, [stop]):
        cut = served.client.completions.create(**{**asked, "n": 1}, stop=given)
        assert cut.choices[0].text == texts[0][: texts[0].index(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_chat_logprobs_are_those_of_the_model(served):
    done = served.client.chat.completions.create(
        model="pico", messages=ASKED, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    tokenizer = pico_tokenizer()
    prompt = tokenizer("<|user|>hello<|assistant|>")["input_ids"]
    row = plain_logits(build_pico("llama"), prompt, len(prompt))[0].log_softmax(-1)
    first = done.choices[0].logprobs.content[0]
    assert len(done.choices[0].logprobs.content) == 3
    assert math.isclose(first.logprob, row.max().item(), abs_tol=1e-4)
    assert [entry.token for entry in first.top_logprobs] == [
        tokenizer.decode([token]) for token in row.topk(2).indices.tolist()
    ]
    assert first.bytes == list(first.token.encode())


def test_echo_with_logprobs_scores_the_prompt_itself(served):
    tokenizer = pico_tokenizer()
    texts = ["hello you", "abc"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    law = merged({served.folders["law"]: 1.0})
    for max_tokens in (0, 1):
        done = served.client.completions.create(
            model="law", prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0
        )
        for choice, text, prompt in zip(done.choices, texts, prompts, strict=True):
            found = choice.logprobs
            assert choice.text[: len(text)] == text
            assert len(found.tokens) == len(prompt) + max_tokens == len(found.token_logprobs)
            assert found.token_logprobs[0] is None and found.text_offset[:3] == [0, 1, 2]
            logs = plain_logits(law, prompt, 1).log_softmax(-1)
            for place in range(1, len(prompt)):
                said = found.token_logprobs[place]
                assert math.isclose(said, logs[place - 1][prompt[place]].item(), abs_tol=1e-4)
                assert max(found.top_logprobs[place].values()) >= said


def test_models_lists_the_base_and_the_adapters_and_no_path(served):
    found = served.client.models.list().data
    assert [model.id for model in found] == ["pico", "law", "tone"]
    assert served.client.models.retrieve("law@1").model_extra["root"] == "local/law@1"
    assert str(served.folders["law"]) not in served.client.models.with_raw_response.list().text


def test_errors_are_the_clients_own_exceptions(served):
    create = served.client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="nobody", messages=ASKED)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="tools"):
        create(
            model="pico", messages=ASKED, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="positions"):
        create(model="pico", messages=ASKED, max_tokens=4000)
    with pytest.raises(openai.BadRequestError):
        create(
            model="pico",
            messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}
            ],
        )


def test_many_async_streams_of_different_adapters_share_one_engine(served):
    async def main() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:

            async def one(model: str) -> tuple[str, str]:
                stream = await client.completions.create(
                    model=model, prompt="abc", temperature=0, max_tokens=10, stream=True,
                    extra_body={"ignore_eos": True},
                )  # fmt: skip
                return model, "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(
                *(one(m) for m in ("pico", "law", "tone", "law*0.5+tone*0.5") * 4)
            )

    by_model: dict[str, set[str]] = {}
    for model, text in asyncio.run(main()):
        by_model.setdefault(model, set()).add(text)
    assert all(len(texts) == 1 for texts in by_model.values())
    assert len({next(iter(texts)) for texts in by_model.values()}) == 4


def test_a_client_that_leaves_gives_its_place_and_blocks_back(served):
    stream = served.client.completions.create(
        model="law", prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()

    async def settled() -> None:
        for _ in range(200):
            if not served.engine.has_work():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the request still runs two seconds after its reader left")

    asyncio.run(settled())
    assert served.engine.blocks.num_free == served.engine.blocks.num_blocks
