"""`loramux key`: API keys of tenants, whose secrets are shown once; and the server's own key for signing receipts."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.cli.tenant import OPERATOR, ActorOption, RootOption, UrlOption, tenancy, when
from loramux.errors import LoramuxError

app = typer.Typer(no_args_is_help=True, help="API keys of tenants.")

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PRIVATE = 0o077  # what the umask takes away: a file with a secret is its owner's


@app.callback()
def about() -> None:
    """API keys of tenants.

    Example: loramux key create acme --scope infer --expires 90d
    """


@app.command("create")
def create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    scope: Annotated[
        list[str],
        typer.Option(help="infer, adapters:read, adapters:write or admin; repeat for several."),
    ],
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="Valid for so long, such as 90d or 12h.")
    ] = None,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Make a key and show its secret, which is not kept and cannot be shown again.

    Example: loramux key create acme --scope infer --scope adapters:read --expires 90d
    """
    expires_in_s = None if expires is None else seconds("--expires", expires)
    with only_json(json), tenancy(root, url) as books:
        made = books.keys.create(tenant, scope, label=label, expires_in_s=expires_in_s, actor=actor)
    _emit_secret({**made.key.to_dict(), "secret": made.secret}, json)


@app.command("list")
def list_(
    tenant: Annotated[str | None, typer.Argument(help="Only this tenant's.")] = None,
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """All keys without their secrets.

    Example: loramux key list acme
    """
    now = time.time()
    with only_json(json), tenancy(root, url) as books:
        found = [{**key.to_dict(), "state": key.state(now)} for key in books.keys.list(tenant)]
    emit(found, json, _show_list)


@app.command("rotate")
def rotate(
    key: Annotated[str, typer.Argument(help="The id that `loramux key list` shows.")],
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="The old key stays valid for so long.")
    ] = "24h",
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Make a new key like this one; both are valid until the overlap ends.

    Example: loramux key rotate 3f9c0a1b2c3d4e5f --overlap 1h
    """
    overlap_s = seconds("--overlap", overlap)
    with only_json(json), tenancy(root, url) as books:
        made = books.keys.rotate(key, overlap_s=overlap_s, actor=actor)
    _emit_secret({**made.key.to_dict(), "secret": made.secret}, json)


@app.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="The id that `loramux key list` shows.")],
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Refuse a key from now on; running servers follow within a second.

    Example: loramux key revoke 3f9c0a1b2c3d4e5f
    """
    with only_json(json), tenancy(root, url) as books:
        revoked = books.keys.revoke(key, actor=actor)
    emit(
        revoked.to_dict(), json, lambda found: print(f"revoked {found['id']} of {found['tenant']}")
    )


@app.command("rotate-signing")
def rotate_signing(
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The server's YAML, where it has one."),
    ] = None,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Make a new key for signing receipts; receipts of the old key can still be verified. Running servers take it.

    Example: loramux key rotate-signing --config serve.yaml
    """
    from loramux.server.signing import Signer

    if config is not None and (root is not None or url is not None):
        raise LoramuxError("--config names the registry; leave --root and --url out")
    folder, root, url = _signing(config, root, url)
    with only_json(json):
        made = Signer.rotate(folder)
        with tenancy(root, url, make=True) as books:
            books.audit.append(actor, "signing_key.rotate", made.key_id)
    found = {"key": made.key_id, "keys": made.public.ids, "folder": str(folder)}
    emit(found, json, _show_signing)


def _signing(
    config: Path | None, root: Path | None, url: str | None
) -> tuple[Path, Path | None, str | None]:
    """(folder of the signing key, root and URL of the database that has the audit log)."""
    from loramux.registry.store import default_root
    from loramux.server.observe import RECEIPTS

    if config is None:
        return (root or default_root()) / "server" / RECEIPTS, root, url
    from loramux.server.build import data_folder
    from loramux.server.config import load_config

    told = load_config(config)
    where = told.registry
    own = None if where.root is None else Path(where.root)
    return data_folder(told) / RECEIPTS, own, told.tenants.url or where.url


def _show_signing(found: dict[str, Any]) -> None:
    print(
        f"receipts will be signed with key {found['key']}; servers that run take it within a second"
    )
    print(f"{len(found['keys'])} public keys verify: {', '.join(found['keys'])}")


def seconds(option: str, text: str) -> float:
    """90d, 12h, 30m or 45s in seconds."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise LoramuxError(f"{option} must be a number and s, m, h or d, such as 90d, got {text!r}")
    return float(int(found[1]) * UNITS[found[2]])


def _emit_secret(found: dict[str, Any], json: str | None) -> None:
    before = os.umask(PRIVATE)
    try:
        emit(found, json, _show_secret)
    finally:
        os.umask(before)


def _show_secret(found: dict[str, Any]) -> None:
    print(f"key {found['id']} of {found['tenant']}: {', '.join(found['scopes'])}")
    if found["expires_at"] is not None:
        print(f"valid until {when(found['expires_at'])} UTC")
    print(found["secret"])
    print("This secret is shown only now.")


def _show_list(found: list[dict[str, Any]]) -> None:
    rows = [
        [
            key["id"],
            key["tenant"],
            key["label"],
            ", ".join(key["scopes"]),
            key["state"],
            when(key["created_at"]),
            when(key["expires_at"]),
        ]
        for key in found
    ]
    columns = ["key", "tenant", "label", "scopes", "state", "created", "expires"]
    table(f"{len(rows)} keys", columns, rows)
