"""`loramux tenant`: who may use the server, how much, and what was changed by whom."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError, RecipeError

if TYPE_CHECKING:
    from loramux.tenancy import Tenancy

app = typer.Typer(no_args_is_help=True, help="Tenants of the server: limits, weight, audit log.")

RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root", metavar="DIR", help="Folder of the registry, as for `loramux registry`."
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Database, if it is not in the registry's folder."),
]
ActorOption = Annotated[
    str, typer.Option("--actor", metavar="NAME", help="Who this is, for the audit log.")
]
WeightOption = Annotated[
    float | None, typer.Option("--weight", help="Share of service; 2 is twice as much as 1.")
]
Limit = Annotated[str | None, typer.Option(metavar="N", help="A number, or none for no limit.")]
Size = Annotated[
    str | None,
    typer.Option(metavar="N", help="Bytes or a size such as 10GiB, or none for no limit."),
]
NO_LIMIT = "none"
OPERATOR = "operator"


@app.callback()
def about() -> None:
    """Tenants of the server: limits, weight, audit log.

    Example: loramux tenant create acme --tokens-per-minute 50000
    """


@contextlib.contextmanager
def tenancy(root: Path | None, url: str | None, *, make: bool = False) -> Iterator[Tenancy]:
    """The tenancy of a registry. Only `tenant create` makes one: a mistyped folder is no server without tenants."""
    from loramux.registry import Registry
    from loramux.registry.store import DATABASE, default_root
    from loramux.tenancy import Tenancy

    folder = root or default_root()
    if not make and url is None and not (folder / DATABASE).exists():
        raise LoramuxError(
            f"there is no registry in {folder}; name another with --root, or make one with `loramux tenant create`"
        )
    registry = Registry.open(root, url=url)
    try:
        yield Tenancy.open(registry.database)
    finally:
        registry.close()


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and '-'.")],
    weight: WeightOption = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_bytes: Size = None,
    max_adapters: Limit = None,
    max_concurrency: Limit = None,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Make a tenant; give it keys with `loramux key create`.

    Example: loramux tenant create acme --weight 2 --tokens-per-minute 50000
    """
    from loramux.tenancy import Limits

    given = _limits(
        requests_per_minute, tokens_per_minute, max_bytes, max_adapters, max_concurrency
    )
    with only_json(json), tenancy(root, url, make=True) as books:
        limits = Limits.from_dict(given)
        made = books.tenants.create(
            name, weight=1.0 if weight is None else weight, limits=limits, actor=actor
        )
    emit(made.to_dict(), json, _show_tenant)


@app.command("list")
def list_(root: RootOption = None, url: UrlOption = None, json: JsonOption = None) -> None:
    """All tenants.

    Example: loramux tenant list --json -
    """
    with only_json(json), tenancy(root, url) as books:
        found = [tenant.to_dict() for tenant in books.tenants.list()]
    emit(found, json, _show_list)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A tenant.")],
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """One tenant: its limits, what it keeps in the registry and what it used.

    Example: loramux tenant show acme
    """
    from loramux.tenancy.service import kept_by

    with only_json(json), tenancy(root, url) as books:
        found = books.tenants.get(name).to_dict()
        num_bytes, num_adapters = kept_by(books.database, name)
        used = books.ledger(name)
        found["kept"] = {"bytes": num_bytes, "adapters": num_adapters}
        found["used"] = {"requests": used.requests, "tokens": used.tokens}
        found["num_keys"] = len(books.keys.list(name))
    emit(found, json, _show_tenant)


@app.command("limit")
def limit(
    name: Annotated[str, typer.Argument(help="A tenant.")],
    weight: WeightOption = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_bytes: Size = None,
    max_adapters: Limit = None,
    max_concurrency: Limit = None,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Change limits or weight; what is not named stays. Running servers follow within a second.

    Example: loramux tenant limit acme --requests-per-minute 60 --max-bytes none
    """
    from loramux.tenancy import Limits

    given = _limits(
        requests_per_minute, tokens_per_minute, max_bytes, max_adapters, max_concurrency
    )
    if not given and weight is None:
        raise LoramuxError(
            "nothing to change: give a limit or --weight; see --help for what there is"
        )
    with only_json(json), tenancy(root, url) as books:
        changed = books.tenants.get(name)
        if given:
            limits = Limits.from_dict(changed.limits.to_dict() | given)
            changed = books.tenants.set_limits(name, limits, actor=actor)
        if weight is not None:
            changed = books.tenants.set_weight(name, weight, actor=actor)
    emit(changed.to_dict(), json, _show_tenant)


@app.command("disable")
def disable(
    name: Annotated[str, typer.Argument(help="A tenant.")],
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Refuse all keys of a tenant within a second. Its adapters stay; `enable` undoes it.

    Example: loramux tenant disable acme
    """
    with only_json(json), tenancy(root, url) as books:
        changed = books.tenants.disable(name, actor=actor)
    emit(changed.to_dict(), json, _show_tenant)


@app.command("enable")
def enable(
    name: Annotated[str, typer.Argument(help="A tenant.")],
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Serve a disabled tenant again.

    Example: loramux tenant enable acme
    """
    with only_json(json), tenancy(root, url) as books:
        changed = books.tenants.enable(name, actor=actor)
    emit(changed.to_dict(), json, _show_tenant)


@app.command("audit")
def audit(
    export: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write all entries, a line of JSON each; '-' shows them."
        ),
    ] = None,
    known: Annotated[
        str | None, typer.Option(metavar="N:HASH", help="A head that an earlier run printed.")
    ] = None,
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """Check the audit log's chain and print its head; keep the head elsewhere and give it to the next check.

    Example: loramux tenant audit --export audit.jsonl --known 41:9f2c...
    """
    with only_json(json), tenancy(root, url) as books:
        head = books.audit.verify(_head(known))
        if export == "-":
            for line in books.audit.export():
                print(line)
        elif export is not None:
            _write_lines(export, books.audit.export())
    found = {"num_entries": head.num_entries, "hash": head.hash, "ok": True}
    stream = sys.stderr if export == "-" else sys.stdout
    emit(
        found,
        json,
        lambda head: print(f"intact; head {head['num_entries']}:{head['hash']}", file=stream),
    )


def _head(text: str | None) -> Any:
    from loramux.tenancy.audit import Head

    if text is None:
        return None
    num, _, digest = text.partition(":")
    if not (num.isdigit() and len(digest) == 64):
        raise LoramuxError(f"--known must be N:HASH as this command prints it, got {text[:90]!r}")
    return Head(int(num), digest)


def _write_lines(target: str, lines: Iterator[str]) -> None:
    try:
        with Path(target).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise LoramuxError(f"--export {target}: cannot be written ({error.strerror})") from None


def _limits(*given: str | None) -> dict[str, int | None]:
    """The limits that were named."""
    from dataclasses import fields

    from loramux.tenancy import Limits

    found: dict[str, int | None] = {}
    for item, text in zip(fields(Limits), given, strict=True):
        if text is not None:
            found[item.name] = None if text == NO_LIMIT else _number(item.name, text)
    return found


def _number(name: str, text: str) -> int:
    from loramux.recipe.sizes import parse_bytes

    value = int(text) if text.isascii() and text.isdigit() else None
    is_size = name == "max_bytes"
    if value is None and is_size:
        with contextlib.suppress(RecipeError):
            value = parse_bytes(text)
    if value is None:
        option, also = (
            f"--{name.replace('_', '-')}",
            " (or a size such as 10GiB)" if is_size else "",
        )
        raise LoramuxError(f"{option} must be a whole number or {NO_LIMIT}{also}, got {text!r}")
    return value


def when(seconds: float | None) -> str:
    """A time as people read it, UTC."""
    if seconds is None:
        return "-"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _show_list(found: list[dict[str, Any]]) -> None:
    rows = [[t["name"], t["weight"], when(t["created_at"]), when(t["disabled_at"])] for t in found]
    table(f"{len(rows)} tenants", ["tenant", "weight", "created", "disabled"], rows)


def _show_tenant(found: dict[str, Any]) -> None:
    rows: list[list[Any]] = [["weight", str(found["weight"])]]
    for name, value in found["limits"].items():
        rows.append([name, "no limit" if value is None else f"{value:,}"])
    for group in ("kept", "used"):
        rows += [[f"{name} {group}", f"{value:,}"] for name, value in found.get(group, {}).items()]
    if "num_keys" in found:
        rows.append(["keys", str(found["num_keys"])])
    rows += [["created", when(found["created_at"])], ["disabled", when(found["disabled_at"])]]
    table(f"tenant {found['name']}", ["what", "value"], rows)
