"""`loramux registry`, verb by verb: a real adapter of a tiny base goes in, is found, changed, and comes out again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.helpers import write_peft
from loramux.cli.main import main
from loramux.registry.crash import main as crash
from pico import build_pico, pico_tokenizer

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build_pico("llama").save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_peft(folder / f"{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a verb on one registry; returns its JSON, or the exit code and the error where `fails`."""

    def call(*words: object, fails: int = 0) -> Any:
        capsys.readouterr()
        more = ["--root", str(tmp_path / "registry"), "--json", "-"]
        code = main(["registry", *map(str, words), *more])
        out, err = capsys.readouterr()
        assert code == fails, err
        return err if fails == 2 else json.loads(out)

    return call


@pytest.fixture
def two(run: Run, adapters: list[Path], base: Path) -> list[Any]:
    """Two versions of sums."""
    return [run("push", folder, "--name", "sums", "--base", base) for folder in adapters]


def test_an_adapter_goes_in_and_comes_out_byte_for_byte(
    run: Run, two: list[Any], adapters: list[Path], tmp_path: Path
) -> None:
    assert [version["ref"] for version in two] == ["local/sums@1", "local/sums@2"]
    assert run("pull", "sums@1", "--out", tmp_path / "out")["ref"] == "local/sums@1"
    for file in two[0]["files"]:
        out = tmp_path / "out" / file["path"]
        assert out.read_bytes() == (adapters[0] / file["path"]).read_bytes()
    assert "is there already" in run("pull", "sums", "--out", tmp_path / "out", fails=2)
    run("pull", "sums", "--out", tmp_path / "out", "--force")


def test_a_pull_replaces_an_adapter_and_nothing_else(
    run: Run, two: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    run("pull", "sums", "--out", tmp_path / "mine", "--force")  # an empty folder
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "loose").symlink_to(tmp_path / "nowhere")
    before = sorted(path for path in tmp_path.rglob("*") if "registry" not in path.parts)
    for name in ("thesis", "file", "link", "loose"):
        error = run("pull", "sums", "--out", tmp_path / name, "--force", fails=2)
        assert "holds no adapter" in error and error.count("\n") == 1
    after = sorted(path for path in tmp_path.rglob("*") if "registry" not in path.parts)
    assert after == before and (tmp_path / "thesis" / "chapter").read_text() == "1"


def test_a_folder_without_a_registry_is_neither_empty_nor_clean(run: Run, tmp_path: Path) -> None:
    verbs = (
        *(["list"], ["search", "x"], ["fsck"], ["collect"], ["show", "x"], ["delete", "x"]),
        *(["alias", "x@1", "y"], ["share", "x", "acme"], ["pull", "x", "--out", tmp_path / "o"]),
        ["score", "x", "a", "b", "1"],
    )
    for verb in verbs:
        assert "there is no registry in" in run(*verb, fails=2)
    assert list(tmp_path.iterdir()) == []


def test_an_alias_goes_although_nothing_is_the_latest(
    run: Run, adapters: list[Path], base: Path
) -> None:
    run("push", adapters[0], "--name", "sums", "--base", base, "--alias", "canary")
    assert run("alias", "sums", "canary", "--remove")["version"] is None
    assert run("show", "sums@1")["aliases"] == []


def test_pushing_the_same_again_changes_nothing(
    run: Run,
    two: list[Any],
    adapters: list[Path],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = shutil.make_archive(str(tmp_path / "parcel"), "zip", adapters[0])
    again = run("push", archive, "--name", "sums", "--base", base)
    assert again["digest"] == two[0]["digest"] and again["version"] == 1
    words = ("push", archive, "--name", "sums", "--base", base, "--json", str(tmp_path / "out"))
    capsys.readouterr()
    root = ["--root", str(tmp_path / "registry")]
    assert main(["registry", *map(str, words), *root, "--meta", "task=sums"]) == 0
    assert "local/sums@1 was there already and keeps its metadata" in capsys.readouterr().err


def test_a_bad_adapter_is_refused_in_one_line_and_nothing_is_stored(
    run: Run, adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapters[0], tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text("{}")
    error = run("push", tmp_path / "bad", "--name", "bad", "--base", base, fails=2)
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "name" in run("push", adapters[0], "--name", "../x", "--base", base, fails=2)
    assert "--meta" in run(
        "push", adapters[0], "--name", "x", "--base", base, "--meta", "x", fails=2
    )
    assert run("list") == []


def test_metadata_samples_and_sharing_are_given_with_the_push(
    run: Run, adapters: list[Path], base: Path, tmp_path: Path
) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [{"prompt": f"How many apples are {i} apples and {i + 1} apples?"} for i in range(12)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--tenant", "ann", "--samples", samples, "--words-only", "--shared")
    run("push", adapters[0], "--name", "sums", "--base", base, "--meta", "task=adding up", *words)
    plain = tmp_path / "samples.txt"
    plain.write_text("\n".join(f"Translate word number {i} into French" for i in range(12)))
    words = ("--tenant", "bob", "--samples", plain, "--words-only")
    run("push", adapters[1], "--name", "french", "--base", base, *words)
    words = ("--tenant", "bob", "--alias", "canary")
    aside = run("push", adapters[0], "--name", "french", "--base", base, *words)["notes"]
    assert not any("samples" in note for note in aside)
    hits = run("search", "--prompt", "How many apples?", "--words-only")
    assert [hit["ref"] for hit in hits] == ["ann/sums@1", "bob/french@1"]
    hits = run("search", "--prompt", "Translate this word", "--words-only", "--tenant", "ann")
    assert [hit["ref"] for hit in hits] == ["ann/sums@1"]
    assert [found["ref"] for found in run("search", "ADDING")] == ["ann/sums@1"]
    assert [found["ref"] for found in run("list", "--tenant", "bob")] == [
        "ann/sums@1",
        "bob/french@1",
    ]
    shown = run("show", "ann/sums")
    assert shown["metadata"] == {"task": "adding up"} and shown["shared_with"] == ["*"]
    lost = run("push", adapters[1], "--name", "sums", "--base", base, "--tenant", "ann")["notes"]
    assert any("by those of ann/sums@1" in note for note in lost)
    plain.write_text("too few\n")
    words = ("--samples", plain, "--words-only")
    run("push", adapters[1], "--name", "few", "--base", base, *words, fails=2)
    assert len(run("list")) == 2


def test_aliases_shares_scores_and_deleting(run: Run, two: list[Any]) -> None:
    assert run("alias", "sums@1", "prod", "--expect", 0)["version"] == 1
    assert "leads to version 1" in run("alias", "sums@2", "prod", "--expect", 2, fails=2)
    run("alias", "sums@2", "prod", "--expect", 1)
    assert run("share", "sums", "acme")["shared_with"] == ["acme"]
    assert run("share", "sums", "acme", "--remove")["shared_with"] == []
    run("score", "sums@prod", "heldout", "sums", 0.5, "--stderr", 0.01, "--note", "100 rows")
    (score,) = run("show", "sums@2")["scores"]
    assert (score["value"], score["provenance"]) == (0.5, {"note": "100 rows"})
    assert "latest, prod still lead" in run("delete", "sums@2", fails=2)
    run("alias", "sums@prod", "prod", "--remove")
    run("alias", "sums@1", "latest")
    assert run("delete", "sums@2")["deleted"] == [2]
    assert run("delete", "sums")["deleted"] == [1]
    assert "does not exist" in run("show", "sums", fails=2)


def test_fsck_and_collect_look_after_the_store(run: Run, two: list[Any], tmp_path: Path) -> None:
    assert run("fsck")["is_clean"]
    run("delete", "sums@1")
    assert run("collect")["num_young"] == 1  # both versions have the same config
    assert run("collect", "--grace", "0s")["num_blobs"] == 1
    assert run("fsck", "--quick", "--repair", "--grace", "0s")["num_blobs"] == 2
    for blob in (tmp_path / "registry" / "blobs").glob("??/*"):
        blob.unlink()
    assert len(run("fsck", fails=1)["missing"]) == 2
    assert "--grace" in run("collect", "--grace", "soon", fails=2)


def test_what_people_see_names_the_essentials(
    run: Run, two: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("score", "sums", "heldout", "sums", 0.5, "--stderr", 0.01)
    root = ["--root", str(tmp_path / "registry")]
    verbs = (
        *(["list"], ["show", "sums"], ["search", "sums"], ["alias", "sums@1", "old"]),
        *(["share", "sums", "*"], ["pull", "sums", "--out", str(tmp_path / "o")], ["fsck"]),
        *(["score", "sums", "a", "b", "1"], ["collect"], ["delete", "sums@2", "--force"]),
        ["alias", "sums@1", "old", "--remove"],
    )
    said = []
    for verb in verbs:
        assert main(["registry", *verb, *root]) == 0
        said.append(capsys.readouterr().out)
    assert "local/sums@2" in said[0] and "0.5000 +- 0.0100" in said[1]
    assert "old: version 1" in said[3] and "clean, 0 leftovers" in said[6]
    assert "deleted 2" in said[9]


def test_the_crash_command_reports_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert crash(["--kills", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
