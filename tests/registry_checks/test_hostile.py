"""Hostile uploads: one error each, soon, in bounded memory, nothing written outside the staging folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.hostile_archives import KINDS, attacks, good, mutations
from fuzz.mutations import mutated_adapters
from fuzz.parcels import BASE, CONFIG, WEIGHTS, parcel
from loramux.formats.peft import read_peft
from loramux.registry.checks import (
    UploadError,
    UploadLimits,
    check_upload,
    from_archive,
    from_folder,
    from_members,
)

MIB_MOST = 256
ATTACKS = list(attacks())


def test_thousands_of_hostile_uploads_in_a_process_of_their_own():
    """The same run as `make fuzz`, with fewer of those that are random."""
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.uploads", "--archives", "300"]
    command += ["--mutations", "2000", "--names", "300", "--seed", "1"]
    before = os.environ.get("PYTHONPATH", "")
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{before}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    result = json.loads(done.stdout)
    assert done.returncode == 0, result
    assert result["changed outside"] == []
    assert result["max_rss_mib"] < MIB_MOST
    assert not result["torch"]
    assert result["crafted archives"]["uploads"] >= 500
    assert result["links"]["uploads"] >= 70
    assert len(result["mutated adapters"]["codes"]) > 12
    for kind in ("links", "crafted archives", "members with hostile names"):
        assert "fault" not in result[kind]["codes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", ["", "my adapter/", "./"])
def test_sound_archives_are_read(kind, top, tmp_path):
    (tmp_path / "a").write_bytes(good(kind, top=top))
    with (
        check_upload(from_members(parcel()), BASE) as one,
        check_upload(from_archive(tmp_path / "a"), BASE) as other,
    ):
        assert one.digest == other.digest


def test_an_archive_of_a_system_with_notes_of_its_own_is_read():
    files = parcel()
    notes = {f"__MACOSX/ad/._{name}": b"x" for name in files} | {
        "ad/.DS_Store": b"x",
        "ad/README.md": b"x",
    }
    with check_upload(
        from_archive(good("zip", {f"ad/{n}": d for n, d in files.items()} | notes)), BASE
    ) as it:
        assert it.notes == ("left out: .DS_Store, README.md",)


def test_what_a_mutated_adapter_passes_with_its_reader_takes_too():
    taken = 0
    for files in mutated_adapters(400, seed=3):
        try:
            with check_upload(from_members(files), BASE) as checked:
                assert read_peft(checked.folder).digest == checked.digest
                taken += 1
        except UploadError:
            pass
    assert taken >= 5


def test_a_folder_of_a_hub_cache_is_read_through_its_own_links(tmp_path):
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number, (name, data) in enumerate(parcel().items()):
        (tmp_path / "blobs" / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    with check_upload(from_folder(snapshot), BASE) as checked:
        assert len(checked.files) == 2


def test_hidden_folders_are_not_entered(tmp_path):
    for name, data in parcel().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".git").mkdir()
    for number in range(1100):
        (tmp_path / ".git" / str(number)).touch()
    with check_upload(from_folder(tmp_path), BASE) as checked:
        assert {file.path for file in checked.files} == {CONFIG, WEIGHTS}


def test_what_the_source_becomes_afterwards_does_not_matter(tmp_path):
    for name, data in parcel().items():
        (tmp_path / name).write_bytes(data)
    with check_upload(from_folder(tmp_path), BASE) as checked:
        (tmp_path / WEIGHTS).write_bytes(b"changed")
        staged = next(file for file in checked.files if file.path == WEIGHTS)
        assert staged.staged.read_bytes() == parcel()[WEIGHTS]


def test_the_generators_say_the_same_again():
    assert [a.data for a in mutations(20, 5)] == [a.data for a in mutations(20, 5)]
    assert list(mutated_adapters(20, 5)) == list(mutated_adapters(20, 5))
    assert len({a.label for a in ATTACKS}) > 500


@pytest.mark.parametrize(
    ("label", "code", "words"),
    [
        ("gz: bomb", "ratio", "200 times its packed size"),
        ("gz: bomb in a member", "ratio", "200 times its packed size"),
        ("zip: bomb", "ratio", "200 times its packed size"),
        ("tar: a name of 2 MB", "bad_archive", "an extended header has 2,097,152 bytes"),
        ("tar: endless extended headers", "too_many_files", "more than the 1,024 members"),
        ("gz: cut", "bad_archive", "in the middle of the gzip stream"),
        ("gz: two streams", "bad_archive", "behind the end"),
        ("zip: many", "too_many_files", "more than the 1,024 members"),
        ("tar: symlink adapter_config.json -> /etc/passwd", "archive_link", "--dereference"),
        ("zip: twice ADAPTER_CONFIG.JSON", "duplicate_member", "two spellings"),
        ("zip: two tops", "missing_file", "adapter_config.json"),
    ],
)
def test_the_worst_archives_are_refused_for_what_they_are(label, code, words):
    attack = next(attack for attack in ATTACKS if attack.label == label)
    with (
        pytest.raises(UploadError, match=words) as caught,
        check_upload(from_archive(attack.data), BASE),
    ):
        pass
    assert caught.value.code == code


def test_an_archive_may_not_unpack_to_more_than_the_limit():
    for kind in KINDS:
        limits = UploadLimits(max_bytes=10_500)
        with (
            pytest.raises(UploadError) as caught,
            check_upload(from_archive(good(kind)), BASE, limits),
        ):
            pass
        assert caught.value.code == "too_large"
