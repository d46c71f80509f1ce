"""Uploads over HTTP: what is stored, what is refused, and that nothing is left of the refused."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loramux.registry import Registry
from loramux.registry.checks import base_shape
from loramux.retrieval import ProfileStore, Retriever, follow
from loramux.server import uploads
from server.bases import FILES, World, make_world, zipped
from server.rig import client, error_of, stub_services

LAW = [f"Is clause {i} of this contract valid under the law of {place}?" for i, place in enumerate(
    ["Kent", "Rome", "Oslo", "Bern", "Lima", "Cork", "Bonn", "Nice", "York", "Pisa", "Riga", "Graz"]
)]  # fmt: skip
KINDS = (
    "letter",
    "mail",
    "note",
    "memo",
    "text",
    "post",
    "reply",
    "toast",
    "speech",
    "card",
    "ode",
)
TONE = [f"Rewrite this {what} so that it sounds friendly and warm" for what in KINDS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


@pytest.fixture
def services(world: World, tmp_path: Path, staging: Path) -> Iterator[Any]:
    with Registry.open(tmp_path / "registry") as registry:
        retriever = Retriever(base=world.shape.digest)
        ProfileStore.beside(registry)
        extras = {"staging": staging, "follower": follow(retriever, registry)}
        yield stub_services(registry=registry, base=world.shape, retriever=retriever, extras=extras)


@pytest.fixture
def served(services: Any) -> TestClient:
    return client(services)


def send(served: TestClient, data: bytes, name: str = "law", **fields: str) -> Any:
    return served.post(
        "/v1/adapters", files={"file": ("adapter.zip", data)}, data={"name": name, **fields}
    )


def test_an_archive_is_checked_stored_and_described(served: TestClient, world: World) -> None:
    reply = send(served, zipped(world.folder("law")), metadata='{"licence": "mit"}')
    assert reply.status_code == 201, reply.text
    view = reply.json()
    assert (view["id"], view["ref"], view["aliases"]) == ("law", "local/law@1", ["latest"])
    assert view["base_digest"] == world.shape.digest and view["metadata"] == {"licence": "mit"}
    assert view["provenance"]["source"] == "upload"
    assert reply.headers["etag"] == '"1"' and reply.headers["location"] == "/v1/adapters/law"
    shown = served.get("/v1/adapters/law").json()
    assert shown == {key: value for key, value in view.items() if key != "notes"}
    answer = served.post("/v1/completions", json={"model": "law", "prompt": "x", "max_tokens": 4})
    assert answer.json()["model"] == "local/law@1"


def test_single_files_are_the_same_adapter_as_the_archive(served: TestClient, world: World) -> None:
    first = send(served, zipped(world.folder("law")))
    files = [("files", (name, (world.folder("law") / name).read_bytes())) for name in FILES]
    again = served.post("/v1/adapters", files=files, data={"name": "law"})
    assert (first.status_code, again.status_code) == (201, 200), again.text
    assert again.json()["digest"] == first.json()["digest"]
    assert len(served.get("/v1/adapters/law/versions").json()["data"]) == 1


def test_a_second_content_is_a_second_version(served: TestClient, world: World) -> None:
    send(served, zipped(world.folder("law")))
    reply = send(served, zipped(world.folder("law", 1)), alias="beta")
    assert reply.json()["ref"] == "local/law@2" and reply.json()["aliases"] == ["beta"]
    assert served.get("/v1/adapters/law").json()["version"] == 1


def test_auto_finds_an_upload_at_once(served: TestClient, world: World) -> None:
    for name, samples in (("law", LAW), ("tone", TONE)):
        reply = send(served, zipped(world.folder(name)), name, samples=json.dumps(samples))
        assert reply.status_code == 201, reply.text
    began = time.monotonic()
    for asked, name in ((LAW[3], "law"), (TONE[4], "tone")):
        body = {"model": "auto", "messages": [{"role": "user", "content": asked}], "max_tokens": 4}
        reply = served.post("/v1/chat/completions", json=body).json()
        assert reply["model"].startswith(f"local/{name}@1"), reply
    assert time.monotonic() - began < 10


def test_sample_prompts_are_not_kept(served: TestClient, world: World, tmp_path: Path) -> None:
    samples = [f"{text} zyzzyva" for text in LAW]
    assert send(served, zipped(world.folder("law")), samples=json.dumps(samples)).status_code == 201
    for path in (tmp_path / "registry").rglob("*"):
        assert not path.is_file() or b"zyzzyva" not in path.read_bytes(), path


# --- Refused ----------------------------------------------------------------------------------------


def assert_nothing_is_left(services: Any, staging: Path) -> None:
    assert services.registry.list("local") == []
    assert list(staging.iterdir()) == []
    report = services.registry.fsck()
    assert report.is_clean and report.num_blobs == 0


def test_a_bad_adapter_is_refused_and_leaves_nothing(
    served: TestClient, services: Any, world: World, staging: Path
) -> None:
    bad = {
        "not an archive": b"hello",
        "empty": zipped_without(world.folder("law"), *FILES),
        "no weights": zipped_without(world.folder("law"), FILES[1]),
        "torn": zipped(world.folder("law"))[:-200],
        "a pickle": zipped(world.folder("law"), **{"adapter_model.bin": b"\x80\x04."}),
    }
    for what, data in bad.items():
        error = error_of(send(served, data), 400)
        assert error["code"] != "internal_error" and error["message"], what
        assert str(staging) not in error["message"]
        if what != "a pickle":
            assert_nothing_is_left(services, staging)


def zipped_without(folder: Path, *left_out: str) -> bytes:
    import io
    import zipfile

    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in set(FILES) - set(left_out):
            archive.write(folder / name, name)
    return data.getvalue()


def test_fields_are_checked(served: TestClient, services: Any, world: World, staging: Path) -> None:
    good = zipped(world.folder("law"))
    for fields, code in (
        ({"name": "../law"}, "bad_name"),
        ({"name": "auto"}, "bad_name"),
        ({"name": "law", "alias": "A"}, "bad_name"),
        ({"name": "law", "visibility": "public"}, None),
        ({"name": "law", "metadata": "[1]"}, "invalid_value"),
        ({"name": "law", "metadata": "{"}, "invalid_value"),
        ({"name": "law", "samples": '["only", 1]'}, "invalid_value"),
        ({"name": "law", "samples": '["only one"]'}, "too_few_samples"),
        ({"name": "law", "nmae": "x"}, "unknown_parameter"),
    ):
        error = error_of(
            served.post("/v1/adapters", files={"file": ("a.zip", good)}, data=fields), 400
        )
        assert code is None or error["code"] == code, (fields, error)
        assert_nothing_is_left(services, staging)


def test_a_body_that_is_no_form_is_refused(served: TestClient, staging: Path) -> None:
    head = {"content-type": "multipart/form-data; boundary=x"}
    torn = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
    for headers, body, status in (
        ({"content-type": "application/json"}, b"{}", 415),
        ({"content-type": "multipart/form-data"}, b"", 415),
        (head, b"", 400),
        (head, b"garbage", 400),
        (head, torn, 400),
        (head, b"--x\r\n" + b"A" * 9000 + b": b\r\n\r\n\r\n--x--\r\n", 400),
        (head, b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n", 400),
        (head, b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\r\n--x--\r\n', 400),
    ):
        error_of(served.post("/v1/adapters", content=body, headers=headers), status)
        assert list(staging.iterdir()) == []


def test_bytes_are_counted_while_they_come(world: World, services: Any, staging: Path) -> None:
    """The sender names no length and never ends: it is cut off at the cap, not when memory or disk is full."""
    served = client(services, uploads={"max_bytes": 100_000})
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 50_000_000:
            sent += 65536
            yield b"\0" * 65536

    head = {"content-type": "multipart/form-data; boundary=x"}
    reply = served.post("/v1/adapters", content=endless(), headers=head)
    assert error_of(reply, 413)["code"] == "too_large"
    assert list(staging.iterdir()) == []

    def endless_end() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nlaw\r\n--x--\r\n'
        yield from (b"\0" * 65536 for _ in range(1000))

    head = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(served.post("/v1/adapters", content=endless_end(), headers=head), 413)
    long = {**head, "content-length": str(10**12)}
    assert error_of(served.post("/v1/adapters", content=b"", headers=long), 413)


def test_large_fields_and_many_parts_are_refused(served: TestClient, staging: Path) -> None:
    long = "x" * (uploads.FIELD_BYTES + 1)
    many = [("files", (f"f{i}", b"")) for i in range(uploads.MAX_PARTS + 1)]
    error_of(served.post("/v1/adapters", data={"name": long}, files={"file": ("a", b"")}), 413)
    error_of(served.post("/v1/adapters", data={"name": "law"}, files=many), 400)
    assert list(staging.iterdir()) == []


def test_one_tenant_has_few_uploads_under_way() -> None:
    slots = uploads.UploadSlots(most=3, most_per_tenant=2)
    with slots.enter("ann"), slots.enter("ann"):
        with pytest.raises(Exception, match="too many uploads"), slots.enter("ann"):
            pass
        bob, refused = slots.enter("bob"), pytest.raises(Exception, match="too many uploads")
        with bob, refused, slots.enter("cid"):
            pass
    with slots.enter("ann"):
        assert slots._held == {"ann": 1}


def test_file_names_of_a_sender_name_no_file_of_ours(
    served: TestClient, services: Any, world: World, tmp_path: Path, staging: Path
) -> None:
    weights = (world.folder("law") / FILES[1]).read_bytes()
    before = {path for path in tmp_path.rglob("*") if "registry" not in path.parts}
    for name in ("../../x", "/etc/x", "a/../../x", "..", "\\x", "a\0b", "CON", "x" * 300):
        files = [("files", (name, weights)), ("files", (FILES[0], b"{}"))]
        reply = served.post("/v1/adapters", files=files, data={"name": "law"})
        assert reply.status_code == 400, (name, reply.text)
    assert {path for path in tmp_path.rglob("*") if "registry" not in path.parts} == before
    assert_nothing_is_left(services, staging)


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    import os

    old, new = (Path(tempfile.mkdtemp(prefix=uploads.PREFIX, dir=tmp_path)) for _ in range(2))
    (old / "part-0").write_bytes(b"x")
    os.utime(old, (0, 0))
    (tmp_path / "other").mkdir()
    assert uploads.sweep(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new.name, "other"])


def test_a_server_without_a_base_takes_no_uploads(world: World) -> None:
    served = client(stub_services())
    error = error_of(send(served, zipped(world.folder("law"))), 503)
    assert error["code"] == "no_uploads"
    assert base_shape(world.base).digest == world.shape.digest


def test_an_upload_that_lacks_something_is_told_what(served: TestClient, world: World) -> None:
    whole = zipped(world.folder("law"))
    for data, fields, param, said in (
        (whole, {"name": ""}, "name", "name is missing"),
        (whole, {"visibility": "public"}, "visibility", "allowed are 'private' and 'shared'"),
        (b"", {}, None, "this is neither a zip nor a tar (it is empty)"),
    ):
        error = error_of(send(served, data, **fields), 400)
        assert error["param"] == param and said in error["message"]


def test_a_name_without_latest_is_listed_as_what_can_be_asked(
    served: TestClient, world: World
) -> None:
    send(served, zipped(world.folder("law")), alias="stable")
    (_, card) = served.get("/v1/models").json()["data"]
    assert card["id"] == "law@1"
    for asked, status in (("law", 404), (card["id"], 200), ("law@stable", 200)):
        body = {"model": asked, "prompt": "x", "max_tokens": 1}
        assert served.post("/v1/completions", json=body).status_code == status
