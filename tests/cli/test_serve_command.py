"""`loramux serve` takes its address before it reads the base: a taken port is one error, port 0 becomes a real one."""

import asyncio
import logging
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.cli import serve
from loramux.cli.main import main
from loramux.server.config import parse_config
from loramux.server.stub import StubEngine
from server.rig import stub_services


def test_a_port_that_is_taken_is_told_before_the_base_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        file.write_text(f"base: {tmp_path / 'missing'}\nport: {taken.getsockname()[1]}\n")
        assert main(["serve", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot listen on 127.0.0.1 port" in said
    assert "choose another host or port" in said


def test_port_0_becomes_a_free_port_and_the_notice_has_it() -> None:
    with serve._bound("127.0.0.1", 0) as one, serve._bound("127.0.0.1", 0) as other:
        port = one.getsockname()[1]
        assert 0 < port != other.getsockname()[1]
        first, _ = serve.notice(parse_config({"base": "pico", "port": 0}), port)
    assert first == f"serving pico at http://127.0.0.1:{port}/v1"


def test_a_line_of_the_servers_log_has_its_time_its_level_and_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    serve.log_with_times()
    logging.getLogger("loramux.server.keys").warning("a key was refused")
    said = capsys.readouterr().err
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d [\d:,]+ WARNING loramux\.server\.keys: a key was refused\n", said
    )


def test_a_stop_gives_calls_the_time_that_the_file_says_and_then_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Any] = []

    class Engine(StubEngine):
        async def shutdown(self, *, finish: bool = True) -> None:
            told.append(finish)

    def server_of(_: Any, end_calls: Any, grace_s: float) -> Any:
        told.append(grace_s)
        return SimpleNamespace(run=lambda sockets: asyncio.run(end_calls()), started=True)

    services = stub_services(engine=Engine())
    monkeypatch.setattr("loramux.server.build.build_services", lambda config: services)
    monkeypatch.setattr("loramux.server.listening.server_of", server_of)
    monkeypatch.setattr(serve, "log_with_times", lambda: None)
    monkeypatch.setattr("gc.freeze", lambda: None)
    serve._run(parse_config({"base": "pico", "port": 0, "limits": {"grace_s": 7}}))
    assert told == [7, False]
