"""The serving demo on a tiny base: a real `loramux serve`, the official client, every step judged by receipts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from engine.helpers import write_peft
from loramux.cli.main import main as cli
from loramux.demo import serve, serve_home, serve_proof, serve_steps, tenants
from loramux.demo.serve_steps import Outcome
from loramux.demo.serve_talk import Answer, Talk
from loramux.errors import LoramuxError
from loramux.eval.loading import load_model
from loramux.registry import Registry
from pico import build_pico, pico_tokenizer

NAMES = [
    "one adapter", "a stream", "a weighted mix", "a MiLoRA", "an upload, used at once", "auto",
    "auto, task not named", "bad uploads", "another tenant", "a share", "receipts", "a replay",
    "a revoked key",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama", max_position_embeddings=512).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that know nothing, in the place of the trained ones."""
    root = tmp_path_factory.mktemp("trained")
    folders = {
        name: write_peft(root / name, seed=seed)
        for seed, name in enumerate((*serve.TASKS, serve.FRESH))
    }
    handle = loramux.attach(load_model(str(base)).model, loramux.MiLoRAConfig(r=2, top_k=3))
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in handle.adapters["default"].parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    folders[serve.MIXTURE] = handle.save(root / serve.MIXTURE)
    return folders


@pytest.fixture(scope="module")
def run(
    base: Path, trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A whole run; what such adapters know is not judged."""
    out = tmp_path_factory.mktemp("run") / "serve"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "train", lambda *_: trained)
        patch.setattr(serve_home, "ENCODER", "none")
        for name in ("LEAST_RIGHT", "LEAST_MIX"):
            patch.setattr(serve_steps, name, 0.0)
        for name in ("ROWS", "AUTO_ROWS"):
            patch.setattr(serve_steps, name, 2)
        return out, serve.main(out, str(base), out / "unused")


def test_every_step_of_the_demo_is_right(run: tuple[Path, dict[str, Any]]) -> None:
    _, result = run
    told = {step["name"]: step["answered"] for step in result["steps"]}
    assert list(told) == NAMES
    assert result["failed"] == [], [told[name] for name in result["failed"]]


def test_what_answered_is_told_from_the_receipts(run: tuple[Path, dict[str, Any]]) -> None:
    told = {step["name"]: step["answered"] for step in run[1]["steps"]}
    assert told["one adapter"].startswith("acme/snips@1: ")
    assert "the base: 0" in told["one adapter"]
    assert told["a weighted mix"].startswith("acme/snips@1*0.7 + acme/banking@1*0.3: ")
    assert told["a MiLoRA"].startswith("acme/milora@1 with its router")
    assert "auto chose acme/clinc@1" in told["an upload, used at once"]
    assert "8 of 8 times" in told["auto"]
    assert told["bad uploads"] == "400 no_op, 400 corrupt, 400 peft_type, 400 archive_kind"
    assert told["another tenant"].endswith("auto: the base")


def test_a_run_leaves_its_report_a_registry_and_no_valid_key(
    run: tuple[Path, dict[str, Any]],
) -> None:
    out, result = run
    assert json.loads((out / serve.REPORT).read_text()) == json.loads(json.dumps(result))
    with Registry.open(out / "registry") as registry:
        kept = {version.ref for version in registry.list("acme")}
        assert kept == {f"acme/{name}@1" for name in (*serve.TASKS, serve.MIXTURE, serve.FRESH)}
        report = registry.fsck()
        assert (report.missing, report.damaged, report.dangling) == ((), (), ())
        from loramux.tenancy import Tenancy

        with Tenancy.open(registry.database) as tenancy:
            keys = tenancy.keys.list()
            tenancy.audit.verify()
    assert keys and all(key.revoked_at is not None for key in keys)


def test_a_second_run_finds_what_was_published_and_uploads_anew(
    run: tuple[Path, dict[str, Any]],
    base: Path,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(run[0] / "registry", tmp_path / "registry")
    monkeypatch.setattr(serve_home, "ENCODER", "none")
    with Registry.open(tmp_path / "registry") as registry:
        serve_home.forget(registry, serve.FRESH)
        serve_home.forget(registry, serve.FRESH)  # none left: no error
        refs = serve_home.publish(registry, str(base), {"snips": (trained["snips"], None)})
        assert refs == {"snips": "acme/snips@1"}
        assert serve.FRESH not in {version.name for version in registry.list("acme")}


def test_training_takes_the_tenants_adapters_and_adds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path
) -> None:
    asked = []

    def train(recipe: Any, out: Path) -> tuple[dict[str, Path], float]:
        jobs = [job.name for job in recipe.jobs_resolved()]
        asked.append((jobs, out))
        return {job: out / job for job in jobs}, 0.0

    monkeypatch.setattr(tenants, "train", train)
    found = serve.train(str(base), tmp_path / "serve", tmp_path / "tenants")
    (shared, where), (own, beside) = asked
    assert set(serve.TASKS) < set(shared) and serve.MIXTURE in shared
    assert (own, where, beside) == ([serve.FRESH], tmp_path / "tenants", tmp_path / "serve")
    assert found[serve.FRESH] == beside / serve.FRESH
    assert found["snips"] == where / "snips"


# --- Steps that see something wrong ---------------------------------------------------------------


class Parrot:
    """A server in which one adapter answers everything, and nothing is refused."""

    base = "pico"

    def __init__(self, ref: str = "globex/other@1") -> None:
        part = {"ref": ref, "digest": "d", "weight": "1", "content": "c"}
        self._said = {"parts": [part], "router": {"ref": ref}}
        self.receipts: list[dict[str, Any]] = []
        self.http = {"acme": self, "globex": self}
        self.clients = {"acme": self, "globex": self}
        self.models = self
        self.status_code, self.id = 201, "acme/snips"

    def ask(self, model: str, row: Any, **_: Any) -> Answer:
        return Answer(row.answer, True, self._said, {})

    def ask_all(self, asked: list[tuple[str, Any]], **_: Any) -> list[Answer]:
        return [self.ask(*one) for one in asked]

    def stream(self, model: str, row: Any) -> tuple[int, Answer]:
        return 1, self.ask(model, row)

    def upload(self, *_: Any) -> "Parrot":
        return self

    def post(self, *_: Any, **__: Any) -> "Parrot":
        return self

    get = delete = post

    def json(self) -> dict[str, Any]:
        return {"ref": "acme/clinc@1", "digest": "d"}

    def list(self) -> "list[Parrot]":
        return [self]


@pytest.fixture
def scene(trained: dict[str, Path]) -> serve_steps.Scene:
    rows = {task: serve._rows(task, "test") for task in (*serve.TASKS, serve.FRESH)}
    refs = {name: f"acme/{name}@1" for name in (*serve.TASKS, serve.MIXTURE)}
    talk: Any = Parrot()
    return serve_steps.Scene(talk, rows, {serve.FRESH: []}, refs, trained[serve.FRESH])


@pytest.mark.parametrize(
    ("name", "step"), serve_steps.ASKING, ids=[name for name, _ in serve_steps.ASKING]
)
def test_right_answers_of_the_wrong_adapter_fail_the_step(
    scene: serve_steps.Scene, name: str, step: serve_steps.Step
) -> None:
    assert not step(scene).is_right


def test_an_adapter_that_knows_nothing_fails_the_step(scene: serve_steps.Scene) -> None:
    class Ignorant(Parrot):
        def ask(self, model: str, row: Any, **_: Any) -> Answer:
            good = super().ask(model, row)
            said = {"parts": []} if model == self.base else good.said
            return Answer("no idea", False, said, {})

    wrong: Any = Ignorant("acme/snips@1")
    assert not serve_steps.one_adapter(replace(scene, talk=wrong)).is_right
    wrong.ask = lambda model, row: replace(Ignorant.ask(wrong, model, row), is_right=True)
    assert serve_steps.one_adapter(replace(scene, talk=wrong)).is_right


def test_a_step_that_breaks_is_wrong_and_the_next_ones_still_run(scene: serve_steps.Scene) -> None:
    def broken(_: serve_steps.Scene) -> Outcome:
        raise KeyError("loramux")

    fine = Outcome("this", "that", True)
    told = serve.run_steps([("one", broken), ("two", lambda _: fine)], scene, lambda _: None)
    assert [(step["name"], step["is_right"]) for step in told] == [("one", False), ("two", True)]
    assert "KeyError" in told[0]["answered"]


def test_a_receipt_that_nobody_signed_fails_the_step(
    run: tuple[Path, dict[str, Any]], scene: serve_steps.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    from loramux.server.signing import Signer

    out, _ = run
    body = {"version": 1, "id": "x", "answers": [], "sampling": {}, "key": "0" * 32}
    scene.talk.receipts.append({**body, "signature": "AAAA"})
    scene.talk.url = "http://127.0.0.1"
    keys = Signer.open(out / "registry" / "server" / "receipts").keys_json()
    monkeypatch.setattr(httpx, "get", lambda _: httpx.Response(200, json=keys))
    with Registry.open(out / "registry") as registry:
        step = [("receipts", lambda s: serve_proof.receipts(s, registry))]
        (told,) = serve.run_steps(step, scene, lambda _: None)
    assert not told["is_right"] and "ReceiptError" in told["answered"]


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("failed", "code"), [([], 0), (["auto", "a share"], 1)])
def test_the_command_ends_with_1_and_names_the_steps_that_were_wrong(
    failed: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = [
        {"name": name, "is_right": name not in failed, "answered": f"<{name}>", "seconds": 0.5}
        for name in NAMES
    ]
    seconds = {"adapters": 1.0, "start": 2.0, "steps": 3.0}
    result = {"steps": steps, "failed": failed, "seconds": seconds}
    monkeypatch.setattr(serve, "main", lambda **_: result)
    assert cli(["serve-demo", "--out", str(tmp_path), "--json", str(tmp_path / "r.json")]) == code
    said = capsys.readouterr()
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert f"{13 - len(failed)} of 13 steps right" in said.out
    assert all(f"<{name}>" in said.out for name in NAMES)
    assert ("these steps were wrong: auto, a share" in said.err) == bool(failed)


def test_a_server_that_does_not_start_is_one_error_with_what_it_said(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("base: no-such-folder\nprot: 1\n")
    with (
        pytest.raises(LoramuxError, match=r"ended with code 2.*prot"),
        serve_home.serving(config),
    ):
        pass


def test_talk_ends_with_its_connections() -> None:
    talk = Talk("http://127.0.0.1:9", {"acme": "key"}, "pico")
    talk.close()
    assert talk.http["acme"].is_closed and talk.clients["acme"].is_closed()
