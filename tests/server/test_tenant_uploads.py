"""Uploads and changes under keys: quotas before anything is kept, scopes, and a line in the audit log for each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.server.app import create_app
from loramux.tenancy import Tenancy
from loramux.tenancy.caller import Limits
from server.bases import World, make_world, zipped
from server.rig import LOCAL, config, error_of, stub_services

WRITER = ("adapters:read", "adapters:write", "infer", "admin")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("law", "tone"))


@pytest.fixture
def rig(world: World, tmp_path: Path) -> Iterator[Any]:
    """A server with two tenants; `client(tenant, *scopes)` is a client with a key of its own."""
    with Registry.open(tmp_path / "registry") as registry:
        tenancy = Tenancy.open(registry.database)
        services = stub_services(
            registry=registry,
            base=world.shape,
            tenancy=tenancy,
            extras={"staging": tmp_path / "staging"},
        )
        (tmp_path / "staging").mkdir()
        limits = {
            "ann": Limits(max_bytes=200_000, max_adapters=2),
            "bob": Limits(),
            "ops": Limits(),
        }
        for tenant, own in limits.items():
            tenancy.tenants.create(tenant, limits=own, actor="test")
        metrics = {"operators": ["ops"]}
        app = create_app(config(tenants={"enabled": True}, metrics=metrics), services)

        def make(tenant: str, *scopes: str) -> TestClient:
            made = tenancy.keys.create(tenant, scopes or WRITER, actor="test")
            head = {"authorization": f"Bearer {made.secret}"}
            return TestClient(app, base_url=LOCAL, headers=head)

        yield SimpleNamespace(
            client=make,
            registry=registry,
            tenancy=tenancy,
            staging=tmp_path / "staging",
            services=services,
        )
        tenancy.close()


def send(served: TestClient, data: bytes, name: str) -> Any:
    return served.post("/v1/adapters", files={"file": ("a.zip", data)}, data={"name": name})


def test_what_a_tenant_keeps_is_never_looked_up_on_the_event_loop(rig: Any, world: World) -> None:
    """Regression: every other request waited for the database, and for uploads of the tenant that held the lock."""
    inner, where = rig.tenancy.quotas._stored, []

    def stored(tenant: str) -> tuple[int, int]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            where.append("a thread")
        else:
            where.append("the event loop")
        return inner(tenant)

    rig.tenancy.quotas._stored = stored
    assert send(rig.client("ann"), zipped(world.folder("law")), "law").status_code == 201
    assert set(where) == {"a thread"}


def test_the_quota_of_bytes_is_checked_and_nothing_is_kept(rig: Any, world: World) -> None:
    rig.tenancy.tenants.set_limits("ann", Limits(max_bytes=1000), actor="test")
    ann = rig.client("ann")
    error = error_of(send(ann, zipped(world.folder("law")), "law"), 403)
    assert error["code"] == "insufficient_quota" and "bytes" in error["message"]
    assert rig.registry.list("ann") == [] and list(rig.staging.iterdir()) == []
    assert rig.registry.fsck().num_blobs == 0


def test_an_upload_that_names_no_length_is_held_against_the_quota_too(
    rig: Any, world: World
) -> None:
    data = zipped(world.folder("law"))
    room = Limits(max_bytes=len(data) // 2)
    rig.tenancy.tenants.set_limits("ann", room, actor="test")
    head = (
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nlaw\r\n'
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    reply = rig.client("ann").post(
        "/v1/adapters",
        content=iter([head, data, b"\r\n--x--\r\n"]),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert error_of(reply, 403)["code"] == "insufficient_quota"
    assert rig.registry.list("ann") == [] and rig.registry.fsck().num_blobs == 0


def test_the_quota_of_adapters_is_checked(rig: Any, world: World) -> None:
    ann = rig.client("ann")
    for name in ("one", "two"):
        assert send(ann, zipped(world.folder("law")), name).status_code == 201
    error = error_of(send(ann, zipped(world.folder("law")), "three"), 403)
    assert error["code"] == "insufficient_quota" and "adapters" in error["message"]
    assert [each.name for each in rig.registry.list("ann")] == ["one", "two"]


def test_a_key_that_may_not_write_changes_nothing(rig: Any, world: World) -> None:
    send(rig.client("ann"), zipped(world.folder("law")), "law")
    reader = rig.client("ann", "adapters:read", "infer")
    for reply in (
        send(reader, zipped(world.folder("tone")), "tone"),
        reader.put("/v1/adapters/law/aliases/prod", json={"version": 1}),
        reader.post("/v1/adapters/law/shares", json={"tenant": "bob"}),
        reader.delete("/v1/adapters/law/shares/bob"),
        reader.delete("/v1/adapters/law"),
        reader.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "law"}),
        reader.post("/v1/unload_lora_adapter", json={"lora_name": "law"}),
        reader.get("/metrics"),
    ):
        assert error_of(reply, 403)["code"] == "permission_denied"
    assert reader.get("/v1/adapters/law").status_code == 200
    assert [each.aliases for each in rig.registry.list("ann")] == [("latest",)]


def test_every_change_is_in_the_audit_log_with_its_key(rig: Any, world: World) -> None:
    ann = rig.client("ann")
    send(ann, zipped(world.folder("law")), "law")
    ann.put("/v1/adapters/law/aliases/prod", json={"version": 1})
    ann.post("/v1/adapters/law/shares", json={"tenant": "bob"})
    ann.delete("/v1/adapters/law/shares/bob")
    ann.post("/v1/load_lora_adapter", json={"lora_name": "copy", "lora_path": "law"})
    ann.post("/v1/unload_lora_adapter", json={"lora_name": "copy"})
    ann.delete("/v1/adapters/law")
    entries = [each for each in rig.tenancy.audit.entries() if each.actor.startswith("ann:")]
    assert [(each.action, each.target) for each in entries] == [
        ("adapter.publish", "ann/law@1"),
        ("alias.set", "ann/law@prod"),
        ("adapter.share", "ann/law"),
        ("adapter.unshare", "ann/law"),
        ("adapter.load", "ann/copy@1"),
        ("adapter.unload", "ann/copy"),
        ("adapter.delete", "ann/law"),
    ]
    rig.tenancy.audit.verify()


def test_names_of_other_tenants_are_not_on_the_metrics_page(rig: Any, world: World) -> None:
    ann, bob = rig.client("ann"), rig.client("bob")
    send(ann, zipped(world.folder("law")), "secret-merger")
    ask = {"prompt": "x", "max_tokens": 2}
    assert ann.post("/v1/completions", json={"model": "secret-merger", **ask}).status_code == 200
    page = bob.get("/metrics")
    assert page.status_code == 200 and "vllm:generation_tokens_total" in page.text
    assert "secret-merger" not in page.text and "ann" not in page.text
    assert "secret-merger" in ann.get("/metrics").text
    assert "secret-merger" in rig.client("ops").get("/metrics").text
    assert error_of(rig.client("ops", "infer").get("/metrics"), 403)["code"] == "permission_denied"


def test_a_foreign_reference_cannot_be_loaded_and_a_shared_one_not_copied(
    rig: Any, world: World
) -> None:
    ann, bob = rig.client("ann"), rig.client("bob")
    send(ann, zipped(world.folder("law")), "law")
    load = {"lora_name": "mine", "lora_path": "ann/law"}
    foreign = bob.post("/v1/load_lora_adapter", json=load)
    missing = bob.post("/v1/load_lora_adapter", json={**load, "lora_path": "ann/war"})
    assert foreign.status_code == missing.status_code == 404
    assert foreign.text.replace("law", "war") == missing.text
    ann.post("/v1/adapters/law/shares", json={"tenant": "bob"})
    assert bob.post("/v1/load_lora_adapter", json=load).status_code == 400
    assert rig.registry.list("bob")[0].tenant == "ann"
