"""`loramux key rotate-signing`: a new key signs, every earlier receipt still verifies, and which key it was is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loramux.cli.main import main
from loramux.registry import Registry
from loramux.server import issuer, signing
from loramux.server.issuer import Issuer
from loramux.server.receipts import Receipt, parse, verify
from loramux.server.signing import PublicKeys, Signer, SigningError
from loramux.tenancy import Tenancy
from server.rig import client, stub_services
from server.test_receipts import sample_receipt


@pytest.fixture
def home(tmp_path) -> Path:
    """A registry whose server has started once and signed a receipt."""
    root = tmp_path / "registry"
    signer = Signer.open(root / "server" / "receipts")
    (tmp_path / "old.json").write_text(json.dumps(sample_receipt(signer).to_json()))
    return root


def rotate(*where: str, code: int = 0) -> None:
    assert main(["key", "rotate-signing", *where]) == code


def detail_of(capsys: Any, *words: str) -> str:
    capsys.readouterr()
    assert main(["verify", *words, "--json", "-"]) == 0
    detail: str = json.loads(capsys.readouterr().out)["checks"][0]["detail"]
    return detail


def test_after_two_rotations_the_first_receipt_verifies_and_is_told_to_be_of_an_earlier_key(
    home, tmp_path, capsys
):
    old = Signer.open(home / "server" / "receipts")
    rotate("--root", str(home))
    rotate("--root", str(home))
    new = Signer.open(home / "server" / "receipts")
    assert len(new.public.ids) == 3 and new.key_id != old.key_id
    (tmp_path / "new.json").write_text(json.dumps(sample_receipt(new).to_json()))
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(new.keys_json()))
    given = ("--server-key", str(keys))
    earlier = detail_of(capsys, str(tmp_path / "old.json"), *given)
    assert earlier == f"key {old.key_id}, an earlier one"
    current = detail_of(capsys, str(tmp_path / "new.json"), *given)
    assert current == f"key {new.key_id}, the current one"


def test_the_keys_file_kept_from_before_verifies_old_receipts_and_not_new_ones(home, tmp_path):
    old = Signer.open(home / "server" / "receipts")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps(old.keys_json()))
    rotate("--root", str(home))
    new = tmp_path / "new.json"
    new.write_text(json.dumps(sample_receipt(Signer.open(old.folder)).to_json()))
    assert main(["verify", str(tmp_path / "old.json"), "--server-key", str(keys)]) == 0
    assert main(["verify", str(new), "--server-key", str(keys)]) == 2


# --- A server that runs -----------------------------------------------------------------------------


class Running:
    """A server over this key, whose clock moves when it is told to."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = home / "server" / "receipts"
        self.now = 1000.0
        monkeypatch.setattr(issuer, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.issuer = Issuer(Signer.open(self.folder))
        self.http = client(stub_services(signer=self.issuer))

    def ask(self) -> tuple[Receipt, PublicKeys]:
        """(a receipt, the keys that the server tells)."""
        reply = self.http.post("/v1/completions", json={"model": "base", "prompt": "x"})
        assert reply.status_code == 200, reply.text
        keys = PublicKeys.from_json(self.http.get("/v1/receipts/key").json())
        return parse(reply.text), keys


def test_a_server_that_runs_signs_with_the_new_key_within_a_second_and_tells_both(
    home, monkeypatch
):
    server = Running(home, monkeypatch)
    old, _ = server.ask()
    rotate("--root", str(home))
    server.now += issuer.LOOK_S / 2
    assert server.ask()[0].body["key"] == old.body["key"]  # it does not look at each call
    server.now += issuer.LOOK_S / 2
    new, keys = server.ask()
    assert new.body["key"] == keys.current == Signer.open(server.folder).key_id != old.body["key"]
    for receipt in (old, new):
        verify(receipt, keys)
    assert server.issuer.num_issued == 3


def test_a_server_that_nobody_calls_tells_the_new_key_as_well(home, monkeypatch):
    server = Running(home, monkeypatch)
    rotate("--root", str(home))
    server.now += issuer.LOOK_S
    told = PublicKeys.from_json(server.http.get("/v1/receipts/key").json())
    assert told.current == Signer.open(server.folder).key_id


def test_a_key_that_cannot_be_read_leaves_the_one_before_until_it_can(home, monkeypatch):
    errors: list[Any] = []
    monkeypatch.setattr(issuer.log, "error", lambda *said: errors.append(said))
    server = Running(home, monkeypatch)
    old, _ = server.ask()
    rotate("--root", str(home))
    (server.folder / "signing.key").chmod(0o644)
    for _ in range(3):
        server.now += issuer.LOOK_S
        assert server.ask()[0].body["key"] == old.body["key"]
    [(_, error)] = errors  # once per change, not once per look
    assert "can be read by others" in str(error)
    (server.folder / "signing.key").chmod(0o600)
    server.now += issuer.LOOK_S
    assert server.ask()[0].body["key"] != old.body["key"]


def test_a_key_that_could_not_be_opened_for_a_moment_is_taken_at_the_next_look(home, monkeypatch):
    """Nothing of the folder changes when a process has files to open again."""
    server = Running(home, monkeypatch)
    old, _ = server.ask()
    rotate("--root", str(home))

    def fails(folder: Path) -> Signer:
        raise SigningError("cannot be opened (Too many open files)")

    with monkeypatch.context() as patch:
        patch.setattr(Signer, "again", fails)
        server.now += issuer.LOOK_S
        assert server.ask()[0].body["key"] == old.body["key"]
    server.now += issuer.LOOK_S
    new, keys = server.ask()
    assert new.body["key"] == keys.current != old.body["key"]


def test_a_rotation_while_the_folder_is_read_is_seen_at_the_next_look(home, monkeypatch):
    server = Running(home, monkeypatch)
    rotate("--root", str(home))
    read = signing.published

    def read_and_rotate(folder: Path) -> PublicKeys:
        found = read(folder)
        monkeypatch.setattr(signing, "published", read)
        rotate("--root", str(home))
        return found

    monkeypatch.setattr(signing, "published", read_and_rotate)
    for _ in range(2):
        server.now += issuer.LOOK_S
        receipt, keys = server.ask()
        verify(receipt, keys)
    assert receipt.body["key"] == Signer.open(server.folder).key_id


def test_a_folder_that_goes_away_does_not_stop_a_server(home, monkeypatch):
    server = Running(home, monkeypatch)
    server.folder.rename(home / "elsewhere")
    server.now += issuer.LOOK_S
    receipt, keys = server.ask()
    verify(receipt, keys)
    assert not server.folder.exists()  # nor is a new key made


def test_a_public_key_that_is_taken_away_is_told_no_longer(home, monkeypatch):
    server = Running(home, monkeypatch)
    old, _ = server.ask()
    rotate("--root", str(home))
    server.now += issuer.LOOK_S
    assert len(server.ask()[1].ids) == 2
    (server.folder / "public" / f"{old.body['key']}.json").unlink()
    server.now += issuer.LOOK_S
    new, keys = server.ask()
    verify(new, keys)
    assert old.body["key"] not in keys


def test_a_look_without_a_change_reads_no_key(home, monkeypatch):
    server = Running(home, monkeypatch)
    before = server.issuer.signer
    for _ in range(3):
        server.now += issuer.LOOK_S
        server.ask()
    assert server.issuer.signer is before


def test_a_rotation_is_in_the_audit_log(home):
    rotate("--root", str(home), "--actor", "jo")
    with Registry.open(home) as registry:
        [entry] = [json.loads(line) for line in Tenancy.open(registry.database).audit.export()]
    assert entry["action"] == "signing_key.rotate" and entry["actor"] == "jo"


def test_a_place_without_a_signing_key_is_not_given_one(tmp_path, capsys):
    rotate("--root", str(tmp_path / "typo"), code=2)
    assert "none to rotate" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_the_configuration_says_where_the_key_lies(home, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"base: pico\nregistry: {{root: registry}}\ndata: {tmp_path}/own\n")
    signer = Signer.open(tmp_path / "own" / "receipts")
    rotate("--config", str(file))
    assert Signer.open(signer.folder).key_id != signer.key_id
    rotate("--config", str(file), "--root", str(home), code=2)
