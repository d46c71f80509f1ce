"""A server's YAML, the command, and whom a server without keys answers to."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.main import main
from loramux.engine.engine import Engine
from loramux.server import build
from loramux.server.config import EngineConfig, ServerConfigError, load_config, parse_config
from server.rig import client, error_of


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({}, "base: missing"),
        ({"base": "x", "prot": 1}, "did you mean 'port'"),
        ({"base": "x", "limits": {"max_massages": 1}}, "did you mean 'max_messages'"),
        ({"base": "x", "port": 70000}, "port"),
        ({"base": "x", "host": "0.0.0.0"}, "without keys"),
        ({"base": "x", "host": "192.168.0.4"}, "tenants.enabled=true"),
    ],
)
def test_a_wrong_configuration_is_named(raw, said):
    with pytest.raises(ServerConfigError, match=said):
        parse_config(raw)


def handed_over(monkeypatch, engine: dict[str, Any]) -> dict[str, Any]:
    """What the engine is called with, for an `engine` block."""
    signature = inspect.signature(Engine.__init__)
    calls: list[dict[str, Any]] = []

    class Fake:
        tokenizer, max_length = None, 8

        def __init__(self, *args: Any, **given: Any) -> None:
            signature.bind(self, *args, **given)  # a name that the engine does not have fails here
            calls.append(given)

    monkeypatch.setattr("loramux.engine.engine.Engine", Fake)
    monkeypatch.setattr("loramux.engine.aio.AsyncEngine", lambda engine: engine)
    build._engine(parse_config({"base": "x", "engine": engine}), Path("x"))
    [given] = calls
    return given


def test_every_setting_of_the_engine_block_reaches_the_engine(monkeypatch):
    block = {
        "dtype": "float64", "kv_memory": "3MiB", "adapter_memory": "4MiB", "slot_memory": 5000,
        "max_slots": 6, "max_batch": 7, "max_step_tokens": 80, "max_chunk": 9,
        "max_prompt_tokens": 10, "max_pauses": 11, "head_start": 12, "prefix_cache": False,
        "threads": 1,
    }  # fmt: skip
    assert block.keys() == EngineConfig.model_fields.keys(), "a new setting has no value here"
    for name, field in EngineConfig.model_fields.items():
        assert block[name] != field.default, f"{name}: the default would arrive by itself"
    monkeypatch.setattr("torch.set_num_threads", lambda count: threads.append(count))
    threads: list[int] = []
    given = handed_over(monkeypatch, block)
    assert threads == [block.pop("threads")]  # of torch, not of an engine
    assert given == block


def test_an_empty_engine_block_leaves_the_engine_its_own_defaults_but_where_tenants_meet(
    monkeypatch,
):
    own = inspect.signature(Engine.__init__).parameters
    given = handed_over(monkeypatch, {})
    changed = {name for name, value in given.items() if value != own[name].default}
    assert changed == {"max_pauses", "max_prompt_tokens"}
    assert (given["max_pauses"], given["max_prompt_tokens"]) == (8, 256)


def test_what_of_the_engine_has_no_setting_is_known():
    own = set(inspect.signature(Engine.__init__).parameters)
    left_out = {
        *("self", "base", "tokenizer", "tenant_weights"),  # from elsewhere in the configuration
        *("block_size", "fuse", "cuda_graphs", "check_base"),
    }
    assert own - set(EngineConfig.model_fields) == left_out


def test_another_host_is_allowed_with_keys():
    assert (
        parse_config({"base": "x", "host": "0.0.0.0", "tenants": {"enabled": True}}).host
        == "0.0.0.0"
    )


def test_relative_folders_start_at_the_file(tmp_path: Path):
    file = tmp_path / "serve.yaml"
    file.write_text("base: smollm2-135m\nregistry: {root: reg}\nuploads: {lora_path_roots: [in]}\n")
    config = load_config(file, ["port=9001", "limits.max_n=2"])
    assert config.registry.root == str(tmp_path / "reg")
    assert config.uploads.lora_path_roots == (str(tmp_path / "in"),)
    assert (config.port, config.limits.max_n, config.name) == (9001, 2, "smollm2-135m")


def test_dry_run_prints_the_resolved_configuration_and_opens_nothing(tmp_path: Path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text("base: no-such-base\n")
    assert main(["serve", str(file), "--set", "port=9001", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["port"] == 9001
    assert main(["serve", str(file), "--set", "host=0.0.0.0"]) == 2
    assert "without keys" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://127.0.0.1:3000"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "[::1"}, 403),
    ],
)
def test_a_server_without_keys_answers_to_this_machine_only(headers, status):
    response = client().get("/health", headers=headers)
    assert response.status_code == status
    if status == 403:
        assert error_of(response, 403)["code"] == "permission_denied"
