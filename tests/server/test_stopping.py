"""A server that is told to stop lets calls under way end, and tells those that it has to end why."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from loramux.cli.serve import _bound
from loramux.engine.aio import AsyncEngine
from loramux.engine.engine import Engine
from loramux.server.app import create_app
from loramux.server.issuer import Issuer
from loramux.server.listening import server_of, uvicorn_config
from loramux.server.receipts import parse
from loramux.server.services import Services
from loramux.server.signing import Signer
from pico import build_pico, pico_tokenizer
from server.rig import config

STEP_S = 0.02
LONG = {
    "model": "pico", "prompt": "abc", "max_tokens": 200, "temperature": 0, "ignore_eos": True,
}  # fmt: skip


class Stopping:
    """A server over a pico engine whose steps take a while; `stop` tells it to, as SIGTERM does."""

    def __init__(self, home: Any, grace_s: float):
        engine = Engine(build_pico("llama"), pico_tokenizer(), kv_memory="4MiB", fuse=False)
        step, self.has_begun = engine.step, threading.Event()

        def slow() -> Any:
            self.has_begun.set()
            time.sleep(STEP_S)
            return step()

        engine.step = slow  # type: ignore[method-assign]
        self.signer = Signer.open(home / "receipts")
        services = Services(
            engine=AsyncEngine(engine), registry=None, tokenizer=pico_tokenizer(),
            max_length=engine.max_length, signer=Issuer(self.signer, None),
        )  # fmt: skip
        told = config(limits={"grace_s": grace_s})
        self.listener = _bound("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.server = server_of(
            uvicorn_config(create_app(told, services), told.limits, log_level="error"),
            lambda: services.engine.shutdown(finish=False),
            told.limits.grace_s,
        )
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [self.listener]}, daemon=True
        )
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True

    def stop_once_begun(self) -> None:
        """Returns at once; a call is under way when it stops, however slow the machine is."""
        threading.Thread(target=lambda: self.has_begun.wait(20) and self.stop()).start()

    def gone(self) -> None:
        self.stop()
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def started(tmp_path: Any) -> Iterator[Any]:
    made: list[Stopping] = []

    def start(grace_s: float) -> Stopping:
        made.append(Stopping(tmp_path, grace_s))
        until = time.monotonic() + 20
        while not made[-1].server.started:
            assert time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        return made[-1]

    yield start
    for server in made:
        server.gone()


def streamed(server: Stopping, **fields: Any) -> list[Any]:
    """What a stream says; the server is told to stop after its first chunk."""
    said: list[Any] = []
    body = {**LONG, "stream": True, **fields}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            server.stop()
            text = line.removeprefix("data: ")
            said.append(text if text == "[DONE]" else json.loads(text))
    return said


@pytest.mark.parametrize("grace_s", [0.0, 0.2])
def test_a_stream_that_outlives_the_grace_ends_with_an_error_its_receipt_and_done(started, grace_s):
    server = started(grace_s)
    *chunks, failed, done = streamed(server)
    assert done == "[DONE]"
    assert failed["error"]["code"] == "overloaded"
    assert failed["error"]["message"] == "the server is stopping"
    receipt = parse(json.dumps(failed["loramux"]["receipt"]))
    (answer,) = receipt.answers
    (said,) = answer["completions"]
    assert said["finish_reason"] == "abort"
    assert 0 < len(chunks) < said["tokens"] + 1 <= LONG["max_tokens"]


def test_a_whole_answer_that_outlives_the_grace_is_a_503_in_the_envelope(started):
    server = started(0.2)
    server.stop_once_begun()
    response = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=30)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"


def test_a_stream_that_ends_within_the_grace_is_whole(started):
    server = started(20)
    *chunks, done = streamed(server, max_tokens=10)
    assert done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
