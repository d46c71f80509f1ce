"""`loramux key rotate-signing`: a new key signs, every earlier receipt still verifies, and which key it was is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from loramux.cli.main import main
from loramux.registry import Registry
from loramux.server.signing import Signer
from loramux.tenancy import Tenancy
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
