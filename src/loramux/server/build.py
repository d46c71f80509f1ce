"""Makes the services of a configuration: base, engine, registry, retriever, tenants, signing key.

Why in this order: what is cheap to get wrong (a database, a key folder) comes before the base is read, which takes
longest; and what was opened is closed again if a later part fails.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loramux.errors import LoramuxError, MissingExtraError
from loramux.fetch import resolve_base
from loramux.registry import Registry
from loramux.server.config import RetrievalConfig, ServerConfig, ServerConfigError
from loramux.server.observe import open_issuer
from loramux.server.services import Services

if TYPE_CHECKING:
    from loramux.registry.checks import BaseShape

log = logging.getLogger(__name__)


def build_services(config: ServerConfig) -> Services:
    """Everything open and ready. The application closes it at its end."""
    with ExitStack() as opened:
        _check_roots(config)
        with _told("registry"):
            registry = _registry(config)
        opened.callback(registry.close)
        with _told("tenants"):
            tenancy = _tenancy(config, registry)
        folder = base_folder(config.base)
        from loramux.registry.checks import base_shape

        shape = base_shape(folder)
        extras: dict[str, Any] = {}
        retriever = _retriever(config.retrieval, registry, shape, extras)
        if config.retrieval.ramole_router is not None and retriever is not None:
            from loramux.server.choosing import RAMOLE
            from loramux.server.ramole import RamoleRouter

            extras[RAMOLE] = RamoleRouter(config.retrieval.ramole_router)
        with _told("data" if config.data is not None else "registry.root"):
            signer = open_issuer(config, data_folder(config), shape.digest)
        engine = _engine(config, folder)
        services = Services(
            engine=engine[0], tokenizer=engine[1], max_length=engine[2], registry=registry,
            tenancy=tenancy, retriever=retriever, signer=signer, base=shape, extras=extras,
        )  # fmt: skip
        opened.pop_all()
    return services


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Name the key of the YAML that an error is about: the parts that are opened do not know where they were named."""
    try:
        yield
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise ServerConfigError(
            f"{key}: {error.filename} cannot be used ({why}); name a folder that may be written"
        ) from None
    except (ServerConfigError, MissingExtraError):
        raise
    except LoramuxError as error:
        raise ServerConfigError(f"{key}: {error}") from None


def _check_roots(config: ServerConfig) -> None:
    for root in config.uploads.lora_path_roots:
        if not Path(root).is_dir():
            raise ServerConfigError(
                f"uploads.lora_path_roots: {root} is no folder; make it, or leave it out"
            )


def base_folder(base: str) -> Path:
    """The folder of a base; a hub id is looked up in the hub's cache, and downloaded where that is allowed."""
    found = resolve_base(base)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    from loramux.fetch import reading_base

    with reading_base(base):
        return Path(snapshot_download(found))


def _registry(config: ServerConfig) -> Registry:
    where = config.registry
    return Registry.open(where.root, url=where.url, blobs=where.blobs)


def _tenancy(config: ServerConfig, registry: Registry) -> Any:
    if not config.tenants.enabled:
        return None
    from loramux.tenancy import Tenancy

    if config.tenants.url is None:
        return Tenancy.open(registry.database, asks_beside=True)
    from loramux.registry.db import open_database
    from loramux.tenancy.service import kept_by

    # What a tenant keeps is in the registry's database, whatever holds the tenants.
    return Tenancy.open(
        open_database(config.tenants.url),
        stored=lambda tenant: kept_by(registry.database, tenant),
        asks_beside=True,
    )


def _retriever(
    config: RetrievalConfig, registry: Registry, shape: BaseShape, extras: dict[str, Any]
) -> Any:
    """Filled from the registry; `extras["follower"]` keeps it in step."""
    if not config.enabled:
        return None
    from loramux.retrieval import AbstainAt, ProfileStore, Retriever, follow

    encoder = _encoder(config)
    index = None
    if config.qdrant_url is not None:
        from loramux.retrieval import QdrantIndex

        with _answering(config.qdrant_url):
            index = QdrantIndex.connect(
                config.qdrant_url, getattr(encoder, "id", None), getattr(encoder, "dim", None),
                collection=config.qdrant_collection,
            )  # fmt: skip
    given = config.threshold
    threshold = AbstainAt(config.false_abstain) if given == "calibrated" else given
    retriever = Retriever(index, encoder, base=shape.digest, min_score=threshold)
    ProfileStore.beside(registry, encoder)
    extras["follower"] = follow(retriever, registry)
    return retriever


@contextmanager
def _answering(url: str) -> Iterator[None]:
    """One error, whatever kinds the client and what it stands on have for a server that is not there."""
    try:
        yield
    except LoramuxError:
        raise
    except Exception as error:
        raise ServerConfigError(
            f"retrieval.qdrant_url: no Qdrant can be used at {url!r} ({error}); start it, or leave the key out"
        ) from None


def _encoder(config: RetrievalConfig) -> Any:
    if config.encoder == "none":
        return None
    from loramux.retrieval import EncoderError, MiniLM

    try:
        return MiniLM.load()
    except (MissingExtraError, EncoderError) as error:
        if config.encoder == "minilm":
            raise
        log.info("retrieval by words alone: %s", error)
        return None


def data_folder(config: ServerConfig) -> Path:
    """Where the server keeps its own: beside the registry unless `data` says otherwise."""
    if config.data is not None:
        return Path(config.data)
    from loramux.registry.store import default_root

    root = default_root() if config.registry.root is None else Path(config.registry.root)
    return root / "server"


def _engine(config: ServerConfig, folder: Path) -> tuple[Any, Any, int | None]:
    """(the async front, the tokenizer, positions of the base)."""
    from loramux.engine.aio import AsyncEngine
    from loramux.engine.engine import Engine

    settings = config.engine.model_dump()
    threads = settings.pop("threads")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    engine = Engine(str(folder), **settings)
    return AsyncEngine(engine), engine.tokenizer, engine.max_length
