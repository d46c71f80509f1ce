"""vLLM's two LoRA calls, replayed: its texts, its statuses, and no file that nobody allowed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.server.vllm import allowed_folder
from server.bases import World, make_world
from server.rig import client, stub_services


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("law",), versions=3)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def root(world: World, tmp_path: Path) -> Path:
    """The folder that may be read; beside it one that may not."""
    for home, version in (("allowed/law-0", 0), ("allowed/law-1", 1), ("other/law", 2)):
        shutil.copytree(world.folder("law", version), tmp_path / home)
    (tmp_path / "allowed" / "empty").mkdir()
    return tmp_path / "allowed"


@pytest.fixture
def served(world: World, registry: Registry, root: Path) -> TestClient:
    services = stub_services(registry=registry, base=world.shape)
    return client(services, uploads={"lora_path_roots": [str(root)]})


def load(served: TestClient, name: str, path: Any, **more: Any) -> Any:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return served.post("/v1/load_lora_adapter", json=body)


def unload(served: TestClient, name: str) -> Any:
    return served.post("/v1/unload_lora_adapter", json={"lora_name": name, "lora_int_id": None})


def fails(reply: Any, status: int, kind: str, message: str) -> None:
    """As vLLM says it: the status is the code, too."""
    assert reply.status_code == status, reply.text
    error = {"message": message, "type": kind, "param": None, "code": status}
    assert reply.json() == {"error": error}


def models(served: TestClient) -> list[str]:
    return [each["id"] for each in served.get("/v1/models").json()["data"]]


def ask(served: TestClient, name: str) -> Any:
    return served.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 2})


def test_the_calls_of_vllm_s_documentation_replay(served: TestClient, root: Path) -> None:
    assert ask(served, "sql_adapter").status_code == 404
    reply = load(served, "sql_adapter", root / "law-0")
    assert (reply.status_code, reply.text) == (
        200, "Success: LoRA adapter 'sql_adapter' added successfully.",
    )  # fmt: skip
    assert reply.headers["content-type"].startswith("text/plain")
    assert "sql_adapter" in models(served) and ask(served, "sql_adapter").status_code == 200
    fails(
        load(served, "sql_adapter", root / "law-0"), 400, "InvalidUserInput",
        "The lora adapter 'sql_adapter' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True.",
    )  # fmt: skip
    reply = unload(served, "sql_adapter")
    assert (reply.status_code, reply.text) == (
        200, "Success: LoRA adapter 'sql_adapter' removed successfully.",
    )  # fmt: skip
    assert "sql_adapter" not in models(served) and ask(served, "sql_adapter").status_code == 404
    fails(
        unload(served, "sql_adapter"), 404, "NotFoundError",
        "The lora adapter 'sql_adapter' cannot be found.",
    )  # fmt: skip
    assert load(served, "sql_adapter", root / "law-0").status_code == 200


def test_loading_in_place_serves_the_new_content(
    served: TestClient, registry: Registry, root: Path
) -> None:
    load(served, "law", root / "law-0")
    first = ask(served, "law").json()
    assert load(served, "law", root / "law-1", load_inplace=True).status_code == 200
    second = ask(served, "law").json()
    assert (first["model"], second["model"]) == ("local/law@1", "local/law@2")
    assert load(served, "law", root / "law-0", load_inplace=True).status_code == 200
    assert registry.resolve("local/law", caller=None).version == 1  # content that was there before


def test_what_is_missing_in_the_body_is_named(served: TestClient) -> None:
    both = "Both 'lora_name' and 'lora_path' must be provided."
    for body in ({}, {"lora_name": "a"}, {"lora_path": "b"}, {"lora_name": "", "lora_path": ""}):
        reply = served.post("/v1/load_lora_adapter", json=body)
        fails(reply, 400, "InvalidUserInput", both)
    reply = served.post("/v1/unload_lora_adapter", json={})
    fails(reply, 400, "InvalidUserInput", "'lora_name' needs to be provided.")
    assert load(served, "x", "law", unknown_field=1).status_code == 404  # as vLLM: it is ignored


def test_a_registry_reference_is_loaded_under_another_name(
    served: TestClient, registry: Registry, world: World
) -> None:
    world.publish(registry, "law", 0)
    version = world.publish(registry, "law", 1)
    for name, path in (("one", "law@1"), ("two", "registry:local/law@2"), ("tri", "loramux://law")):
        assert load(served, name, path).status_code == 200, path
    assert registry.resolve("local/two", caller=None).digest == version.digest
    assert registry.resolve("local/one", caller=None).digest != version.digest


def test_an_upload_is_not_unloaded(served: TestClient, registry: Registry, world: World) -> None:
    world.publish(registry, "law", 0)
    reply = unload(served, "law")
    assert reply.status_code == 400 and "DELETE /v1/adapters/law" in reply.text
    assert "law" in models(served)


# --- Paths ------------------------------------------------------------------------------------------


def test_every_path_that_is_not_allowed_gets_the_same_answer(
    served: TestClient, registry: Registry, root: Path, tmp_path: Path
) -> None:
    (root / "link").symlink_to(tmp_path / "other" / "law")
    (root / "up").symlink_to(tmp_path / "other")
    (tmp_path / "allowed-too").mkdir()
    tried = [
        tmp_path / "other" / "law",
        root / "nothing",
        root / "link",
        root / "up" / "law",
        f"{root}/../other/law",
        f"{root}/law-0/../../other/law",
        tmp_path / "allowed-too",
        root,
        "/",
        "/etc",
        "/proc/self/cwd",
        "nobody/law",
        "law@3",
        "../other/law",
        "file:///etc/passwd",
        "https://example.com/law",
        "~/law",
    ]
    for path in tried:
        fails(load(served, "x", path), 404, "NotFoundError", f"No adapter found for {path}")
    assert load(served, "x", f"{root}/a\0b").status_code == 404
    assert registry.list("local") == []


def test_without_roots_no_folder_is_read(world: World, registry: Registry) -> None:
    served = client(stub_services(registry=registry, base=world.shape))
    assert load(served, "x", world.folder("law")).status_code == 404


def test_a_root_that_is_a_link_itself_is_the_operator_s_choice(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    alias = str(tmp_path / "alias")
    assert allowed_folder(f"{alias}/law-0", [alias]) == Path(os.path.realpath(root)) / "law-0"
    assert allowed_folder(str(root / "law-0"), [alias]) == Path(os.path.realpath(root)) / "law-0"
    assert allowed_folder(f"{alias}x/law-0", [alias]) is None


def test_a_folder_without_an_adapter_is_refused_and_nothing_is_stored(
    served: TestClient, registry: Registry, root: Path
) -> None:
    (root / "bad").mkdir()
    (root / "bad" / "adapter_config.json").write_text("{}")
    for folder in ("empty", "bad"):
        reply = load(served, "x", root / folder)
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "BadRequestError"
        assert str(root) not in reply.text
    for name in ("../x", "auto", "X", "a" * 200):
        assert load(served, name, root / "law-0").status_code == 400
        assert unload(served, name).status_code == 404
    assert registry.list("local") == []
