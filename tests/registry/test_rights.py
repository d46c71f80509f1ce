"""Who sees what: own, shared with one, shared with all; foreign is missing, down to the number of queries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import event

from loramux.registry import NotFound, Registry, RegistryError
from registry.uploads import put


@pytest.fixture
def three(registry: Registry, tmp_path: Path) -> Registry:
    """Ann has a private, a shared and a public adapter, Bob has one of his own."""
    put(registry, tmp_path, "p", name="private")
    put(registry, tmp_path, "s", name="lent")
    put(registry, tmp_path, "o", name="open", visibility="shared")
    put(registry, tmp_path, "b", name="bobs", tenant="bob")
    registry.share("ann/lent", "bob", "t")
    return registry


def names(registry: Registry, caller: str | None) -> list[str]:
    return [f"{version.tenant}/{version.name}" for version in registry.visible(caller)]


def test_a_caller_sees_own_and_shared_and_the_operator_everything(three: Registry) -> None:
    assert names(three, "ann") == ["ann/lent", "ann/open", "ann/private"]
    assert names(three, "bob") == ["ann/lent", "ann/open", "bob/bobs"]
    assert names(three, "eve") == ["ann/open"]
    assert names(three, None) == ["ann/lent", "ann/open", "ann/private", "bob/bobs"]


def test_resolving_and_listing_agree(three: Registry) -> None:
    for caller in ("ann", "bob", "eve", None):
        seen = names(three, caller)
        for ref in names(three, None):
            if ref in seen:
                assert three.resolve(ref, caller=caller).ref.startswith(ref)
                assert three.versions(ref, caller)
            else:
                with pytest.raises(NotFound):
                    three.resolve(ref, caller=caller)
                with pytest.raises(NotFound):
                    three.versions(ref, caller)


def test_unsharing_takes_effect_at_once(three: Registry) -> None:
    three.unshare("ann/lent", "bob", "t")
    three.unshare("ann/open", "*", "t")
    assert names(three, "bob") == ["bob/bobs"]
    assert three.resolve("ann/open", caller="ann").visibility == "private"


def test_shares_of_a_name_are_its_owners_to_read(three: Registry) -> None:
    assert three.shared_with("ann/lent", "ann") == ("bob",)
    assert three.shared_with("ann/open") == ("*",)
    with pytest.raises(NotFound):
        three.shared_with("ann/lent", "bob")


Ask = Callable[[Registry, str], object]
ASKED: dict[str, Ask] = {
    "resolve": lambda r, ref: r.resolve(ref, caller="eve"),
    "resolve a version": lambda r, ref: r.resolve(f"{ref}@1", caller="eve"),
    "resolve a digest": lambda r, ref: r.resolve(f"{ref}@sha256:{'0' * 64}", caller="eve"),
    "versions": lambda r, ref: r.versions(ref, "eve"),
    "set alias": lambda r, ref: r.set_alias(ref, "prod", 1, actor="t", caller="eve"),
    "set alias, expecting": lambda r, ref: r.set_alias(
        ref, "x", 1, expect=1, actor="t", caller="eve"
    ),
    "drop alias": lambda r, ref: r.drop_alias(ref, "latest", actor="t", caller="eve"),
    "share": lambda r, ref: r.share(ref, "eve", "t", caller="eve"),
    "unshare": lambda r, ref: r.unshare(ref, "*", "t", caller="eve"),
    "delete": lambda r, ref: r.delete(ref, "t", caller="eve"),
    "delete a version": lambda r, ref: r.delete(f"{ref}@1", "t", caller="eve"),
    "delete by force": lambda r, ref: r.delete(f"{ref}@latest", "t", force=True, caller="eve"),
}


def test_a_foreign_name_answers_like_a_missing_one(three: Registry) -> None:
    def answer(ask: Ask, ref: str) -> tuple[str, str, list[str]]:
        statements: list[str] = []

        def note(_c: object, _u: object, statement: str, *_: object) -> None:
            statements.append(statement)

        event.listen(three.database, "before_cursor_execute", note)
        try:
            with pytest.raises(NotFound) as refused:
                ask(three, ref)
        finally:
            event.remove(three.database, "before_cursor_execute", note)
        return str(refused.value).replace(ref, "REF"), refused.value.code, statements

    before = three.generation()
    for name, ask in ASKED.items():
        foreign, missing, unknown = (
            answer(ask, ref) for ref in ("ann/private", "ann/missing", "nobody/private")
        )
        assert foreign == missing == unknown, name
    assert three.generation() == before


def test_using_a_shared_adapter_does_not_mean_changing_it(three: Registry) -> None:
    for change in (
        lambda: three.set_alias("ann/lent", "prod", 1, actor="t", caller="bob"),
        lambda: three.delete("ann/lent", "t", caller="bob"),
        lambda: three.share("ann/lent", "eve", "t", caller="bob"),
    ):
        with pytest.raises(NotFound):
            change()
    three.set_alias("lent", "prod", 1, actor="t", caller="ann")


def test_a_new_version_asking_to_be_private_never_appears_under_a_shared_name(
    three: Registry, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match="unshare"):
        put(three, tmp_path, "x", name="open", visibility="private")
    assert len(three.versions("ann/open", "eve")) == 1
    put(three, tmp_path, "x", name="open")
    assert len(three.versions("ann/open", "eve")) == 2


def test_a_name_deleted_and_used_again_is_shared_with_nobody(
    three: Registry, tmp_path: Path
) -> None:
    three.delete("ann/open", "t")
    three.delete("ann/lent@1", "t", force=True)
    put(three, tmp_path, "new", name="open")
    put(three, tmp_path, "new", name="lent")
    assert names(three, "bob") == ["bob/bobs"]


def test_a_receiver_of_a_share_has_a_tenants_name(three: Registry) -> None:
    for tenant in ("", "*/x", "Bob", "a" * 64):
        with pytest.raises(ValueError, match="tenant name"):
            three.share("ann/lent", tenant, "t")
