"""`/v1/adapters`: who sees what, aliases by compare-and-swap, versions, shares, deleting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.tenancy.caller import SCOPES, Caller
from server.bases import World, make_world, zipped
from server.rig import LOCAL, client, config, error_of, stub_services


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("law", "tone"), versions=3)


@pytest.fixture
def registry(tmp_path: Any) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture
def served(world: World, registry: Registry) -> TestClient:
    """The one user of a server without keys, with three versions of law and one of tone."""
    for version in range(3):
        world.publish(registry, "law", version)
    world.publish(registry, "tone")
    return client(stub_services(registry=registry, base=world.shape))


def as_tenant(registry: Registry, world: World, tenant: str) -> TestClient:
    """The same routes for a caller of another tenant; keys are tested elsewhere."""
    from loramux.server.app import create_app
    from loramux.server.auth import authorise

    app = create_app(config(), stub_services(registry=registry, base=world.shape))

    async def proven(request: Any) -> None:
        request.state.caller = Caller(tenant, "key", frozenset(SCOPES))

    # FastAPI reads the parameter by its type.
    from starlette.requests import Request

    proven.__annotations__["request"] = Request
    app.dependency_overrides[authorise] = proven
    return TestClient(app, base_url=LOCAL)


# --- List and show ----------------------------------------------------------------------------------


def test_a_list_has_one_entry_per_name_in_pages(served: TestClient) -> None:
    first = served.get("/v1/adapters", params={"limit": 1}).json()
    assert [each["ref"] for each in first["data"]] == ["local/law@3"] and first["has_more"]
    second = served.get("/v1/adapters", params={"limit": 1, "after": first["next"]}).json()
    assert [each["id"] for each in second["data"]] == ["tone"] and not second["has_more"]
    found = served.get("/v1/adapters", params={"query": "ton"}).json()
    assert [each["id"] for each in found["data"]] == ["tone"]
    assert served.get("/v1/adapters", params={"base": "f" * 64}).json()["data"] == []
    for wrong in ({"limit": 0}, {"limit": 10**6}, {"query": "a\0b"}, {"after": "x" * 300}):
        error_of(served.get("/v1/adapters", params=wrong), 400)


def test_a_version_is_shown_by_number_alias_and_digest(served: TestClient) -> None:
    digest = served.get("/v1/adapters/law@2").json()["digest"]
    for wanted, version in (
        ("law", 3),
        ("law@2", 2),
        ("law@latest", 3),
        (f"law@sha256:{digest}", 2),
    ):
        reply = served.get(f"/v1/adapters/{wanted}")
        assert (reply.json()["version"], reply.headers["etag"]) == (version, f'"{version}"')
    versions = served.get("/v1/adapters/law/versions").json()["data"]
    assert [each["version"] for each in versions] == [1, 2, 3]
    assert {"path", "sha256", "bytes"} == set(versions[0]["files"][0])


def test_missing_and_malformed_names_are_errors_without_paths(served: TestClient) -> None:
    for name, status in (
        ("nobody", 404),
        ("law@9", 404),
        ("law@nothing", 404),
        ("LAW", 400),
        ("a b", 400),
    ):
        error = error_of(served.get(f"/v1/adapters/{name}"), status)
        assert error["code"] == ("model_not_found" if status == 404 else "bad_name")


# --- Aliases ----------------------------------------------------------------------------------------


def put(served: TestClient, alias: str, version: int, **headers: str) -> Any:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    url = f"/v1/adapters/law/aliases/{alias}"
    return served.put(url, json={"version": version}, headers=names)


def test_an_alias_is_made_and_moved(served: TestClient) -> None:
    assert put(served, "prod", 1).json()["aliases"] == ["prod"]
    reply = put(served, "prod", 2)
    assert reply.status_code == 200 and reply.headers["etag"] == '"2"'
    assert served.get("/v1/adapters/law@prod").json()["version"] == 2


def test_an_alias_moves_only_from_where_if_match_says(served: TestClient) -> None:
    put(served, "prod", 1)
    assert put(served, "prod", 2, if_match='"1"').status_code == 200
    assert error_of(put(served, "prod", 3, if_match='"1"'), 409)["code"] == "conflict"
    assert served.get("/v1/adapters/law@prod").json()["version"] == 2
    tag = served.get("/v1/adapters/law@prod").headers["etag"]
    assert put(served, "prod", 3, if_match=tag).status_code == 200


def test_preconditions_on_existence_are_412(served: TestClient) -> None:
    assert error_of(put(served, "prod", 1, if_match="*"), 412)["code"] == "precondition_failed"
    assert put(served, "prod", 1, if_none_match="*").status_code == 200
    assert error_of(put(served, "prod", 2, if_none_match="*"), 412)["code"] == "precondition_failed"
    assert put(served, "prod", 2, if_match="*").status_code == 200
    assert served.get("/v1/adapters/law@prod").json()["version"] == 2
    for bad in ("abc", '"x"', '"0"', '"-1"', '"1", "2"', ""):
        error_of(put(served, "prod", 1, if_match=bad), 400)


def test_of_many_who_swap_at_once_one_wins(served: TestClient) -> None:
    put(served, "prod", 1)
    replies: list[int] = []

    def swap(version: int) -> None:
        replies.append(put(served, "prod", version, if_match='"1"').status_code)

    threads = [threading.Thread(target=swap, args=(2 + i % 2,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [200] + [409] * 7


def test_an_alias_to_nothing_is_refused(served: TestClient) -> None:
    error_of(put(served, "prod", 9), 404)
    for body in ({}, {"version": "1"}, {"version": 0}, {"version": 1, "x": 2}, {"version": True}):
        error_of(served.put("/v1/adapters/law/aliases/prod", json=body), 400)
    error_of(served.put("/v1/adapters/law@1/aliases/prod", json={"version": 1}), 400)
    error_of(put(served, "PROD", 1), 400)


# --- Deleting ---------------------------------------------------------------------------------------


def test_a_version_with_an_alias_is_deleted_only_by_force(served: TestClient) -> None:
    assert served.delete("/v1/adapters/law@1").json()["deleted"]
    error_of(served.get("/v1/adapters/law@1"), 404)
    error_of(served.delete("/v1/adapters/law@3"), 409)
    assert served.delete("/v1/adapters/law@3", params={"force": True}).status_code == 200


def test_a_deleted_name_is_gone_from_the_next_request_on(served: TestClient) -> None:
    ask = {"model": "tone", "prompt": "x", "max_tokens": 2}
    assert served.post("/v1/completions", json=ask).status_code == 200
    assert served.delete("/v1/adapters/tone").status_code == 200
    assert error_of(served.post("/v1/completions", json=ask), 404)["code"] == "model_not_found"
    error_of(served.delete("/v1/adapters/tone"), 404)


# --- Tenants ----------------------------------------------------------------------------------------

CHANGES = [
    ("DELETE", "/v1/adapters/law", None),
    ("DELETE", "/v1/adapters/law@1", None),
    ("PUT", "/v1/adapters/law/aliases/prod", {"version": 1}),
    ("POST", "/v1/adapters/law/shares", {"tenant": "bob"}),
    ("DELETE", "/v1/adapters/law/shares/bob", None),
]


def test_a_foreign_adapter_looks_like_a_missing_one(registry: Registry, world: World) -> None:
    world.publish(registry, "law", tenant="ann")
    bob = as_tenant(registry, world, "bob")
    assert bob.get("/v1/adapters").json()["data"] == []
    for path in ("/v1/adapters/{}", "/v1/adapters/{}/versions"):
        foreign, missing = (
            bob.get(path.format(name), params={"tenant": "ann"}) for name in ("law", "war")
        )
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace("law", "war") == missing.text
    for method, path, body in CHANGES:
        replies = [
            bob.request(method, path.replace("law", name), json=body) for name in ("law", "war")
        ]
        assert [reply.status_code for reply in replies] == [404, 404], path
    assert registry.resolve("ann/law", caller="ann").version == 1


def test_a_share_lets_another_tenant_look_and_use_and_ends(
    registry: Registry, world: World
) -> None:
    world.publish(registry, "law", tenant="ann", provenance={"data": "secret source"})
    ann, bob = as_tenant(registry, world, "ann"), as_tenant(registry, world, "bob")
    assert ann.post("/v1/adapters/law/shares", json={"tenant": "bob"}).status_code == 201
    seen = bob.get("/v1/adapters/law", params={"tenant": "ann"}).json()
    assert seen["id"] == "ann/law" and "provenance" not in seen
    assert [each["id"] for each in bob.get("/v1/adapters").json()["data"]] == ["ann/law"]
    assert "secret source" in ann.get("/v1/adapters/law").text
    ask = {"model": "ann/law", "prompt": "x", "max_tokens": 2}
    assert bob.post("/v1/completions", json=ask).status_code == 200
    assert ann.delete("/v1/adapters/law/shares/bob").status_code == 200
    error_of(bob.get("/v1/adapters/law", params={"tenant": "ann"}), 404)


def test_who_an_adapter_is_shared_with_may_not_change_it(registry: Registry, world: World) -> None:
    """The routes take own names only, so a foreign tenant is reached through what they call by it."""
    world.publish(registry, "law", tenant="ann", visibility="shared")
    world.publish(registry, "law", tenant="bob")
    bob = as_tenant(registry, world, "bob")
    for method, path, body in CHANGES:
        url = path.replace("law", "ann%2Flaw")
        assert bob.request(method, url, json=body).status_code in (400, 404, 405), url
        bob.request(method, path, json=body, params={"tenant": "ann"})
    [version] = registry.versions("ann/law", None)
    assert version.aliases == ("latest",) and registry.shared_with("ann/law") == ("*",)


def test_an_upload_goes_to_the_caller_s_own_tenant(registry: Registry, world: World) -> None:
    bob = as_tenant(registry, world, "bob")
    files = {"file": ("a.zip", zipped(world.folder("law")))}
    assert bob.post("/v1/adapters", files=files, data={"name": "law"}).json()["ref"] == "bob/law@1"
    error_of(bob.post("/v1/adapters", files=files, data={"name": "ann/law"}), 400)
    assert registry.list("ann") == []


def test_share_targets_are_checked(served: TestClient) -> None:
    for tenant in ("", "Ann", "a/b", "x" * 64, "**"):
        error_of(served.post("/v1/adapters/law/shares", json={"tenant": tenant}), 400)
    reply = served.post("/v1/adapters/law/shares", json={"tenant": "*"})
    assert (
        reply.status_code == 201 and served.get("/v1/adapters/law").json()["visibility"] == "shared"
    )
