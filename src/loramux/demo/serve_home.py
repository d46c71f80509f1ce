"""What the serving demo needs before it asks: a registry with adapters, two tenants with keys, a server that runs.

Why a process of its own for the server: what is shown is `loramux serve` as an operator starts it, and a key that is
revoked here must be noticed there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from loramux.errors import LoramuxError, MissingExtraError

if TYPE_CHECKING:
    from loramux.registry import Registry
    from loramux.retrieval import Encoder
    from loramux.tenancy import Tenancy

OWNER, OTHER = "acme", "globex"
SCOPES = ("infer", "adapters:read", "adapters:write")
LABEL = ACTOR = "serve-demo"
ENCODER = "auto"  # as the server's configuration has it
CONFIG, LOG = "serve.yaml", "server.log"
START_S, STOP_S = 300.0, 40.0
_ADDRESS = re.compile(r" at (http://\S+:\d+/v1)$", re.MULTILINE)


def write_config(out: Path, base: str) -> Path:
    """The YAML for `loramux serve`, with its registry beside it."""
    path = out / CONFIG
    config = {
        "base": base,
        "port": 0,
        "registry": {"root": "registry"},
        "tenants": {"enabled": True},
        "retrieval": {"encoder": ENCODER},
        "engine": {"max_batch": 16, "kv_memory": "256MiB"},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def publish(
    registry: Registry, base: str, adapters: Mapping[str, tuple[Path, Sequence[str] | None]]
) -> dict[str, str]:
    """Publish name -> (folder, samples) under OWNER, unless they are there; returns name -> reference."""
    from loramux.registry.checks import base_shape, check_upload, from_folder
    from loramux.retrieval import ProfileStore
    from loramux.server.build import base_folder

    shape = base_shape(base_folder(base))
    ProfileStore.beside(registry, _encoder())
    refs = {}
    for name, (folder, samples) in adapters.items():
        with check_upload(from_folder(folder), shape) as checked:
            version = registry.publish(
                checked, tenant=OWNER, name=name, samples=samples, actor=ACTOR,
                metadata={"made_by": ACTOR},
            )  # fmt: skip
        refs[name] = version.ref
    return refs


def forget(registry: Registry, name: str) -> None:
    """Delete what a run before this one uploaded, so that it can be uploaded again."""
    from loramux.registry import NotFound

    with suppress(NotFound):
        registry.delete(f"{OWNER}/{name}", actor=ACTOR)


@contextmanager
def keys(tenancy: Tenancy) -> Iterator[dict[str, tuple[str, str]]]:
    """Tenant -> (key id, secret), of keys that are revoked when this ends."""
    from loramux.tenancy import TenancyError

    made = {}
    for tenant in (OWNER, OTHER):
        try:
            tenancy.tenants.create(tenant, actor=ACTOR)
        except TenancyError as error:
            if error.code != "tenant_exists":
                raise
        _revoke(tenancy, tenant)
        new = tenancy.keys.create(tenant, SCOPES, label=LABEL, actor=ACTOR)
        made[tenant] = (new.key.id, new.secret)
    try:
        yield made
    finally:
        for tenant in made:
            _revoke(tenancy, tenant)


@contextmanager
def serving(config: Path) -> Iterator[str]:
    """`loramux serve` in a process of its own; its URL, up to /v1, once it is ready."""
    log = config.parent / LOG
    command = [sys.executable, "-m", "loramux", "serve", str(config)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
        )
    try:
        yield _ready(server, log)
    finally:
        server.terminate()
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _ready(server: subprocess.Popen[bytes], log: Path) -> str:
    """Wait for the address in the log, then for /ready."""
    import httpx

    until = time.monotonic() + START_S
    while time.monotonic() < until and server.poll() is None:
        found = _ADDRESS.search(log.read_text(encoding="utf-8", errors="replace"))
        if found is not None:
            url = found[1]
            with suppress(httpx.TransportError):
                if httpx.get(f"{url.removesuffix('/v1')}/ready", timeout=10).status_code == 200:
                    return url
        time.sleep(0.1)
    how = "did not get ready" if server.poll() is None else f"ended with code {server.returncode}"
    raise LoramuxError(f"the server {how}; it said: {_end_of(log)}")


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return " / ".join(lines[-3:]) or "nothing"


def _revoke(tenancy: Tenancy, tenant: str) -> None:
    for key in tenancy.keys.list(tenant):
        if key.label == LABEL and key.revoked_at is None:
            tenancy.keys.revoke(key.id, actor=ACTOR)


def _encoder() -> Encoder | None:
    """The one that the server will use."""
    from loramux.retrieval import MiniLM

    if ENCODER == "none":
        return None
    try:
        return MiniLM.load()
    except MissingExtraError:
        return None
