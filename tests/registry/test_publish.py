"""Publishing and reading back: versions, aliases, digests, metadata, and what is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text

from loramux.registry import Conflict, NotFound, Registry, RegistryError, Version
from loramux.registry.db import begin, reading
from loramux.registry.names import NameProblem, Ref
from registry.uploads import put, sha, upload


def counted(registry: Registry) -> dict[str, int]:
    """Rows per table: what must not change when something is refused."""
    tables = ("adapters", "versions", "version_files", "aliases", "shares", "blob_leases")
    with reading(registry.database) as connection:
        count = {
            t: connection.execute(text(f"SELECT count(*) FROM {t}")).scalar_one() for t in tables
        }
    return {**count, "generation": registry.generation()}


def test_a_published_version_is_found_by_number_alias_digest_and_without_any(
    registry: Registry, tmp_path: Path
) -> None:
    first = put(registry, tmp_path, "a", metadata={"task": "sums"}, provenance={"seed": 3})
    second = put(registry, tmp_path, "b")
    for ref in ("ann/sums@1", f"ann/sums@sha256:{first.digest}"):
        assert registry.resolve(ref, caller="ann").id == first.id
    for ref in ("ann/sums", "sums", "sums@latest", "sums@2", Ref("ann", "sums", 2)):
        assert registry.resolve(ref, caller="ann") == second
    assert (second.ref, second.version, second.aliases) == ("ann/sums@2", 2, ("latest",))
    again = registry.resolve("sums@1", caller="ann")
    assert again.aliases == () and replace(again, aliases=("latest",)) == first
    assert (first.metadata, first.provenance) == ({"task": "sums"}, {"seed": 3})
    assert (first.method, first.servability, first.max_rank, first.base_digest) == (
        *("lora", "static", 8),
        "b" * 64,
    )
    assert [f.path for f in first.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert first.files[1].sha256 == sha(b"a") and first.num_bytes == 3


def test_the_same_content_again_is_the_same_version_and_takes_the_alias(
    registry: Registry, tmp_path: Path
) -> None:
    first = put(registry, tmp_path, "a", metadata={"task": "sums"})
    put(registry, tmp_path, "b")
    again = put(registry, tmp_path, "a", metadata={"task": "other"})
    assert again == first  # with its first metadata: a version never changes
    assert registry.resolve("sums", caller="ann").version == 1
    assert put(registry, tmp_path, "a", name="other").version == 1


def test_the_same_content_for_another_base_never_passes_for_the_version_it_was(
    registry: Registry, tmp_path: Path
) -> None:
    put(registry, tmp_path, "a", base="b" * 64)
    put(registry, tmp_path, "b", base="b" * 64)
    before = counted(registry)
    with pytest.raises(Conflict, match="version 1 already, checked against another base"):
        put(registry, tmp_path, "a", base="c" * 64)
    assert counted(registry) == before
    assert put(registry, tmp_path, "a", name="other", base="c" * 64).base_digest == "c" * 64


def test_an_alias_may_be_left_alone(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a")
    put(registry, tmp_path, "b", alias=None)
    assert registry.resolve("sums", caller="ann").version == 1
    put(registry, tmp_path, "c", alias="canary")
    assert registry.resolve("sums@canary", caller="ann").version == 3


def test_the_same_name_of_two_tenants_is_two_adapters(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a", tenant="ann")
    put(registry, tmp_path, "b", tenant="bob")
    assert (
        registry.resolve("sums", caller="ann").digest
        != registry.resolve("sums", caller="bob").digest
    )


def nested(levels: int) -> Any:
    return 1 if levels == 0 else [{"x": nested(levels - 2)}] if levels > 1 else [1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "../x"}, "bad_name"),
    "reserved": ({"name": "auto"}, "bad_name"),
    "tenant": ({"tenant": "Ann"}, "bad_name"),
    "alias": ({"alias": "1"}, "bad_name"),
    "metadata": ({"metadata": {"x": float("nan")}}, "bad_metadata"),
    "metadata type": ({"metadata": {"x": object()}}, "bad_metadata"),
    "metadata too deep": ({"metadata": {"x": nested(16)}}, "bad_metadata"),
    "provenance too deep": ({"provenance": {"x": nested(900)}}, "bad_metadata"),
    "half a letter": ({"metadata": {"x": "\ud83e"}}, "bad_metadata"),
    "half a letter in a key": ({"metadata": {"\udcff": 1}}, "bad_metadata"),
    "metadata size": ({"provenance": {"x": "y" * 20_000}}, "bad_metadata"),
    "visibility": ({"visibility": "public"}, "registry"),
    "actor": ({"actor": ""}, "bad_actor"),
    "actor control code": ({"actor": "a\x1b[2J"}, "bad_actor"),
    "samples": ({"samples": b"profile"}, "no_keeper"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_error_and_changes_nothing(
    registry: Registry, tmp_path: Path, case: str
) -> None:
    put(registry, tmp_path, "a")
    before = counted(registry)
    more, code = BAD[case]
    with pytest.raises((RegistryError, NameProblem)) as refused:
        put(registry, tmp_path, "b", **more)
    assert refused.value.code == code
    assert counted(registry) == before


def test_staged_bytes_that_changed_since_the_check_are_refused(
    registry: Registry, tmp_path: Path
) -> None:
    checked = upload(tmp_path / "staged", "a")
    checked.files[1].staged.write_bytes(b"something else")
    before = counted(registry)
    with pytest.raises(RegistryError, match="not what was checked") as refused:
        registry.publish(checked, tenant="ann", name="sums", actor="tester")
    assert refused.value.code == "corrupt"
    assert counted(registry) == before
    assert (tmp_path / "registry" / "blobs" / "tmp").is_dir()  # it was tried
    assert list((tmp_path / "registry" / "blobs" / "tmp").iterdir()) == []


def test_the_generation_rises_with_every_change_and_with_nothing_else(
    registry: Registry, tmp_path: Path
) -> None:
    seen = [registry.generation()]

    def rises() -> bool:
        seen.append(registry.generation())
        return seen[-1] > seen[-2]

    version = put(registry, tmp_path, "a")
    assert rises()
    put(registry, tmp_path, "b")
    assert rises()
    registry.set_alias("ann/sums", "prod", 1, actor="t")
    assert rises()
    registry.share("ann/sums", "bob", "t")
    assert rises()
    registry.unshare("ann/sums", "bob", "t")
    assert rises()
    registry.drop_alias("ann/sums", "prod", actor="t")
    assert rises()
    registry.resolve("ann/sums", caller=None), registry.list(None), registry.folder(version)
    registry.add_score(version, "suite", "task", 0.5)
    with pytest.raises(NotFound):
        registry.set_alias("ann/sums", "prod", 9, actor="t")
    assert not rises()
    registry.delete("ann/sums@1", "t")
    assert rises()
    registry.delete("ann/sums", "t")
    assert rises()


def test_a_keeper_gets_the_samples_inside_the_transaction(
    registry: Registry, tmp_path: Path
) -> None:
    kept: list[tuple[str, Any]] = []

    def keep(connection: Connection, version: Version, samples: Any) -> None:
        connection.execute(text("UPDATE adapters SET created_at = 7"))
        kept.append((version.ref, samples))
        if samples == b"bad":
            raise RegistryError("not enough samples")

    registry.add_keeper(keep)
    put(registry, tmp_path, "a", samples=b"good")
    put(registry, tmp_path, "b")
    before = counted(registry)
    with pytest.raises(RegistryError, match="not enough"):
        put(registry, tmp_path, "c", samples=b"bad")
    assert kept == [("ann/sums@1", b"good"), ("ann/sums@3", b"bad")]
    assert counted(registry) == before
    assert put(registry, tmp_path, "c").version == 3


def test_scores_are_kept_in_order_and_checked(registry: Registry, tmp_path: Path) -> None:
    version = put(registry, tmp_path, "a")
    registry.add_score(version, "tasks", "sums", 0.5, 0.01, {"rows": 100})
    registry.add_score(version, "tasks", "sums", 0.75)
    first, second = registry.scores(version)
    assert (first.value, first.stderr, first.provenance) == (0.5, 0.01, {"rows": 100})
    assert (second.task, second.value, second.stderr) == ("sums", 0.75, None)
    for value, stderr in ((float("nan"), None), (1.0, -1.0), (float("inf"), None)):
        with pytest.raises(RegistryError, match="finite"):
            registry.add_score(version, "tasks", "sums", value, stderr)
    registry.delete("ann/sums", "t")
    with pytest.raises(NotFound):
        registry.add_score(version, "tasks", "sums", 1.0)


def test_a_registry_survives_being_closed_and_opened(
    open_registry: Callable[..., Registry], tmp_path: Path
) -> None:
    first = open_registry()
    version = put(first, tmp_path, "a", visibility="shared")
    first.close()
    assert open_registry().resolve("ann/sums", caller="bob") == version


def test_text_that_databases_stumble_over_is_kept_as_it_is(
    registry: Registry, tmp_path: Path
) -> None:
    odd = {
        "nul": "a\0b",
        "quote": "'; DROP TABLE versions; --",
        "emoji": "🦙",
        "%_": ["\\", {"x": 1}],
    }
    assert put(registry, tmp_path, "a", metadata=odd).metadata == odd
    assert registry.list("ann", query="'; drop table")[0].name == "sums"
    assert registry.list("ann", query="🦙") and not registry.list("ann", query="%a%")


def test_two_registries_in_one_process_do_not_meet(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "one") as one, Registry.open(tmp_path / "two") as two:
        put(one, tmp_path, "a")
        assert two.list(None) == [] and len(one.list(None)) == 1


def test_a_transaction_that_fails_is_undone(registry: Registry, tmp_path: Path) -> None:
    put(registry, tmp_path, "a")
    before = counted(registry)

    def fail_half_way() -> None:
        with begin(registry.database) as connection:
            connection.execute(text("DELETE FROM aliases"))
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert counted(registry) == before
