"""From a YAML to a running server: real base, registry, retrieval and receipts; and what stays after a restart."""

import io
import json
import threading
import zipfile
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from engine.helpers import write_peft
from loramux.registry import Registry
from loramux.server import build
from loramux.server.app import create_app
from loramux.server.build import build_services
from loramux.server.config import ServerConfigError, load_config, parse_config
from loramux.server.receipts import parse, verify
from loramux.server.signing import PublicKeys
from pico import build_pico, pico_tokenizer
from server.rig import LOCAL


def start(file: Path) -> TestClient:
    config = load_config(file)
    return TestClient(create_app(config, build_services(config)), base_url=LOCAL)


def archive(folder: Path) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for path in sorted(folder.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                file.writestr(path.name, path.read_bytes())
    return out.getvalue()


def test_a_server_from_a_file_serves_uploads_finds_them_and_signs_what_answered(tmp_path):
    build_pico("llama").save_pretrained(tmp_path / "base")
    pico_tokenizer().save_pretrained(str(tmp_path / "base"))
    file = tmp_path / "serve.yaml"
    file.write_text(
        "base: base\nmodel_name: pico\nregistry: {root: reg}\nretrieval: {encoder: none, threshold: 0.05}\n"
        "engine: {kv_memory: 4MiB}\n"
    )
    topics = {"law": "court judge lease clause", "food": "oven sugar flour bake"}
    answers = {}
    with start(file) as http:
        for place, (name, words) in enumerate(topics.items()):
            samples = json.dumps([f"{words} {i}" for i in range(12)])
            made = http.post(
                "/v1/adapters",
                data={"name": name, "samples": samples},
                files={"file": ("a.zip", archive(write_peft(tmp_path / name, seed=place)))},
            )
            assert made.status_code == 201, made.text
            assert made.json()["notes"] == []
        mute = http.post(
            "/v1/adapters",
            data={"name": "law"},
            files={"file": ("a.zip", archive(write_peft(tmp_path / "mute", seed=7)))},
        ).json()
        assert "'auto' no longer finds local/law" in mute["notes"][0]
        back = http.put("/v1/adapters/law/aliases/latest", json={"version": 1})
        assert back.status_code == 200, back.text
        keys = PublicKeys.from_json(http.get("/v1/receipts/key").json())
        for model, label in (("auto", "local/law@1"), ("law*0.5+food*0.5", None), ("pico", "pico")):
            asked = {
                "model": model,
                "prompt": "the judge in court",
                "temperature": 0,
                "max_tokens": 4,
            }
            body = http.post("/v1/completions", json=asked).json()
            assert label in (None, body["model"])
            receipt = parse(body)
            verify(receipt, keys)
            parts = receipt.answers[0]["parts"]
            assert [p["ref"] for p in parts] == [p["ref"] for p in body["loramux"]["adapters"]]
            assert all(part["content"] for part in parts)
            answers[model] = body["choices"][0]["text"]
    with start(file) as http:  # all of it is still there
        assert [card["id"] for card in http.get("/v1/models").json()["data"]] == [
            "pico",
            "food",
            "law",
        ]
        for model, text in answers.items():
            asked = {
                "model": model,
                "prompt": "the judge in court",
                "temperature": 0,
                "max_tokens": 4,
            }
            body = http.post("/v1/completions", json=asked).json()
            assert body["choices"][0]["text"] == text
            verify(parse(body), keys)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"registry": {"root": "{file}/reg"}}, "registry: "),
        ({"registry": {"url": "postgresql://a:secret@127.0.0.1:1/b"}}, "registry: "),
        ({"tenants": {"enabled": True, "url": "sqlite:///{file}/t.sqlite3"}}, "tenants: "),
        ({"data": "{file}/data"}, "data: {file}/data"),
        ({"uploads": {"lora_path_roots": ["{file}"]}}, "uploads.lora_path_roots: {file} is no folder"),
        (
            {"retrieval": {
                "encoder": "none", "qdrant_url": "http://127.0.0.1:1", "qdrant_collection": "mine",
            }},
            "retrieval.qdrant_url: ",
        ),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_opened_is_one_error_that_names_its_key(
    tmp_path, monkeypatch, named, said
):
    def connect(*_, collection):  # its client warns in a thread of its own
        raise RuntimeError(f"{collection}: connection refused")

    monkeypatch.setattr("loramux.retrieval.QdrantIndex.connect", connect)
    build_pico("llama").save_pretrained(tmp_path / "base")
    pico_tokenizer().save_pretrained(str(tmp_path / "base"))
    (tmp_path / "file").write_text("")
    text = json.dumps(
        {"base": str(tmp_path / "base"), "registry": {"root": str(tmp_path)}, **named}
    )
    config = parse_config(json.loads(text.replace("{file}", str(tmp_path / "file"))))
    with pytest.raises(ServerConfigError) as caught:
        build_services(config)
    assert str(caught.value).startswith(said.replace("{file}", str(tmp_path / "file")))
    assert "qdrant" not in said or "mine: connection refused" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", [False, True])
def test_a_server_reads_keys_beside_its_event_loop(tmp_path: Path, url: bool) -> None:
    tenants = {"enabled": True, **({"url": f"sqlite:///{tmp_path / 'tenants'}"} if url else {})}
    with Registry.open(tmp_path) as registry:
        tenancy = build._tenancy(parse_config({"base": "x", "tenants": tenants}), registry)
        tenancy.tenants.create("acme", actor="test")
        threads: list[str] = []
        real = tenancy.cache._ask

        def ask(now: float) -> None:
            threads.append(threading.current_thread().name)
            real(now)

        tenancy.cache._ask = ask
        tenancy.cache._asked_at = tenancy.cache._known_at = -float("inf")
        assert set(tenancy.cache.tenants()) == {"acme"}
        assert threads and threading.current_thread().name not in threads
