"""Profiles in the registry: kept with the publish, followed by every process, gone with the alias."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from loramux.registry import Registry, Version
from loramux.registry.db import begin
from loramux.retrieval.errors import ProfileError
from loramux.retrieval.following import follow
from loramux.retrieval.profile import Profile, make_profile
from loramux.retrieval.qdrant import QdrantIndex
from loramux.retrieval.retriever import Retriever
from loramux.retrieval.store import ProfileStore
from loramux.retrieval.tables import profiles
from loramux.retrieval.where import EVERYTHING, Where
from postgres import fresh_schema, postgres_url
from registry.uploads import BASE, put
from retrieval.pools import TOPICS, WordEncoder, samples

__all__ = ["postgres_url"]


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    url = None
    if request.param == "postgresql":
        url = fresh_schema(request.getfixturevalue("postgres_url"))
    with Registry.open(tmp_path / "registry", url=url) as made:
        yield made


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Registry]:
    """On SQLite only, for claims that do not depend on the database."""
    with Registry.open(tmp_path / "registry") as made:
        yield made


def publish(registry: Registry, folder: Path, topic: str, **more: Any) -> Version:
    return put(registry, folder, topic, name=topic, samples=samples(topic), **more)


def found(
    retriever: Retriever, prompt: str = "the queen and the river", caller: str = "ann"
) -> set[str]:
    return set(retriever.retrieve(prompt, 10, allowed=Where.visible_to(caller, BASE)).ids)


def test_a_retriever_follows_publishing_sharing_moving_and_deleting(
    registry: Registry, tmp_path: Path
) -> None:
    encoder = WordEncoder()
    store = ProfileStore.beside(registry, encoder)
    for topic in TOPICS:
        publish(registry, tmp_path, topic)
    retriever = Retriever(encoder=encoder)
    follower = follow(retriever, registry)
    everyone = {f"ann/{topic}@1" for topic in TOPICS}
    assert found(retriever) == everyone and found(retriever, caller="bob") == set()
    assert not follower.sync()

    registry.share("ann/chess", "bob", "tester")
    registry.share("ann/law", "*", "tester")
    assert follower.sync()
    assert found(retriever, caller="bob") == {"ann/chess@1", "ann/law@1"}
    assert found(retriever, caller="eve") == {"ann/law@1"}
    registry.unshare("ann/chess", "bob", "tester")
    follower.sync()
    assert found(retriever, caller="bob") == {"ann/law@1"}

    second = put(registry, tmp_path, "new chess", name="chess", samples=samples("chess", seed=1))
    follower.sync()
    assert found(retriever) == everyone - {"ann/chess@1"} | {"ann/chess@2"}
    registry.set_alias("ann/chess", "latest", 1, actor="tester")
    follower.sync()
    assert found(retriever) == everyone
    registry.delete("ann/bread", "tester")
    follower.sync()
    assert found(retriever) == everyone - {"ann/bread@1"}
    store.delete(registry.resolve("ann/law", caller=None))
    follower.sync()
    assert found(retriever) == everyone - {"ann/bread@1", "ann/law@1"}
    assert store.get(second, encoder.id) is not None and store.get(second) is None


def test_what_is_stored_is_what_was_given(registry: Registry, tmp_path: Path) -> None:
    store = ProfileStore.beside(registry)
    made = make_profile(samples("stars"), WordEncoder(), seed=7)
    version = put(registry, tmp_path, "x", samples=made.to_bytes())
    read = store.get(version, "words-16")
    assert read is not None and read.to_bytes() == made.to_bytes()
    other = make_profile(samples("law"), WordEncoder())
    before = registry.generation()
    store.put(version, other)
    assert registry.generation() > before
    again = store.get(version, "words-16")
    assert again is not None and again.to_bytes() == other.to_bytes()


def test_bad_samples_undo_the_publish(local: Registry, tmp_path: Path) -> None:
    ProfileStore.beside(local)
    for wrong in (["too few"], b"no profile", 7, {"a": 1}):
        with pytest.raises(ProfileError):
            put(local, tmp_path, "x", samples=wrong)
    assert local.list(None) == []


def test_only_one_base_can_be_retrieved(local: Registry, tmp_path: Path) -> None:
    ProfileStore.beside(local)
    publish(local, tmp_path, "chess")
    publish(local, tmp_path, "law", base="c" * 64)
    retriever = Retriever(base="c" * 64)
    follow(retriever, local)
    assert retriever.retrieve("queen", 5, allowed=EVERYTHING).ids == ("ann/law@1",)
    own = Retriever()
    follow(own, local, caller="bob")
    assert own.index.count() == 0


def test_profiles_of_another_encoder_are_searched_by_their_words(
    local: Registry, tmp_path: Path
) -> None:
    ProfileStore.beside(local, WordEncoder())
    publish(local, tmp_path, "chess")
    newer = WordEncoder(8, name="newer")
    retriever = Retriever(encoder=newer)
    follower = follow(retriever, local)
    hit = retriever.retrieve("queen takes knight", 1, allowed=EVERYTHING).hits[0]
    assert hit.id == "ann/chess@1" and hit.dense is None
    store = ProfileStore(local.database, newer)
    store.put(local.resolve("ann/chess", caller=None), samples("chess"))
    follower.sync()
    assert retriever.retrieve("queen", 1, allowed=EVERYTHING).hits[0].dense is not None


def test_one_unreadable_profile_does_not_keep_the_others_out(
    local: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ProfileStore.beside(local)
    broken = publish(local, tmp_path, "chess")
    publish(local, tmp_path, "law")
    with begin(local.database) as connection:
        own = profiles.c.version_id == broken.id
        connection.execute(update(profiles).where(own).values(body=b"junk", sha256="0" * 64))
    retriever = Retriever()
    with caplog.at_level(logging.WARNING):
        follow(retriever, local)
    assert retriever.index.ids() == ["ann/law@1"]
    assert "ann/chess@1 cannot be retrieved" in caplog.text


def test_an_index_that_outlives_a_server_forgets_what_was_withdrawn_between_two(
    local: Registry, tmp_path: Path
) -> None:
    qdrant = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    client = qdrant.QdrantClient(":memory:")
    ProfileStore.beside(local)
    broken, *_ = (publish(local, tmp_path, topic) for topic in ("chess", "law", "bread"))
    follow(Retriever(QdrantIndex(client)), local)
    assert QdrantIndex(client).ids() == ["ann/bread@1", "ann/chess@1", "ann/law@1"]
    local.delete("ann/bread", "tester")
    with begin(local.database) as connection:
        own = profiles.c.version_id == broken.id
        connection.execute(update(profiles).where(own).values(body=b"junk", sha256="0" * 64))
    second = QdrantIndex(client)
    follow(Retriever(second), local)
    assert second.ids() == ["ann/law@1"]
    follow(Retriever(second), local, caller="bob")  # sees nothing, which is no reason to empty it
    assert second.ids() == ["ann/law@1"]


def test_a_follower_takes_out_nothing_that_its_registry_never_had(
    local: Registry, tmp_path: Path
) -> None:
    """Of another registry in the same collection, or put there by hand."""
    ProfileStore.beside(local)
    publish(local, tmp_path, "chess")
    with Registry.open(tmp_path / "other") as other:
        ProfileStore.beside(other)
        publish(other, tmp_path, "law", tenant="bob")
        retriever = Retriever()
        retriever.upsert("by hand", make_profile(samples("bread")), owner="me")
        for registry, expected in (
            (local, ["ann/chess@1", "by hand"]), (other, ["ann/chess@1", "bob/law@1", "by hand"]),
            (local, ["ann/chess@1", "bob/law@1", "by hand"]),
        ):  # fmt: skip
            follow(retriever, registry)
            assert sorted(retriever.index.ids()) == expected
        other.delete("bob/law", "tester")
        follow(retriever, other)
        assert sorted(retriever.index.ids()) == ["ann/chess@1", "by hand"]


FOLLOWS = """
import json, sys
from loramux.registry import Registry
from loramux.retrieval import Retriever, Where, follow
registry, retriever = Registry.open(sys.argv[1]), Retriever()
follower = follow(retriever, registry)
print(json.dumps(retriever.index.ids()), flush=True)
for line in sys.stdin:
    print(json.dumps([follower.sync(), retriever.index.ids()]), flush=True)
print(json.dumps([m for m in ("torch", "transformers", "sentence_transformers") if sys.modules.get(m)]))
"""


def test_another_process_finds_it_at_its_next_look_without_torch(
    local: Registry, tmp_path: Path
) -> None:
    ProfileStore.beside(local)
    publish(local, tmp_path, "chess")
    command = [sys.executable, "-c", BLOCKED + FOLLOWS, str(tmp_path / "registry")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert json.loads(other.stdout.readline()) == ["ann/chess@1"]
        publish(local, tmp_path, "law")
        for expected in (
            [True, ["ann/chess@1", "ann/law@1"]],
            [False, ["ann/chess@1", "ann/law@1"]],
        ):
            other.stdin.write("look\n")
            other.stdin.flush()
            assert json.loads(other.stdout.readline()) == expected
        other.stdin.close()
        assert json.loads(other.stdout.read()) == []
    assert other.returncode == 0


BLOCKED = """
import sys
for name in ("torch", "transformers", "tokenizers", "sentence_transformers", "sklearn", "scipy"):
    sys.modules[name] = None
"""


def test_many_adapters_come_in_at_once(local: Registry, tmp_path: Path) -> None:
    ProfileStore.beside(local)
    for i in range(12):
        put(local, tmp_path, f"c{i}", name=f"a{i}", samples=samples("law", seed=i))
    retriever = Retriever()
    follow(retriever, local)
    assert retriever.index.count() == 12 and retriever.background.num_profiles == 12
    assert np.isfinite(retriever.background.idf).all()
    assert isinstance(
        ProfileStore(local.database).get(local.resolve("ann/a3", caller=None)), Profile
    )
