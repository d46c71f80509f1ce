"""A server's YAML, the command, and whom a server without keys answers to."""

import json
from pathlib import Path

import pytest

from loramux.cli.main import main
from loramux.server.config import ServerConfigError, load_config, parse_config
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
