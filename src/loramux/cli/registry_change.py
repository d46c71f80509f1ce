"""`loramux registry`, the verbs that change or look after what is there: alias, share, delete, score, fsck, collect."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json
from loramux.cli.registry import (
    LOCAL,
    OPERATOR,
    ActorOption,
    BlobsOption,
    RefArgument,
    RootOption,
    TenantOption,
    UrlOption,
    find,
    opened,
)
from loramux.cli.registry import (
    app as app,
)
from loramux.errors import LoramuxError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
GraceOption = Annotated[
    str,
    typer.Option("--grace", metavar="TIME", help="Younger things are left alone: 30m, 24h, 7d."),
]


@app.command("alias")
def alias(
    ref: Annotated[
        str, typer.Argument(metavar="REF", help="Where it leads: [tenant/]name@version.")
    ],
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as prod or canary.")],
    expect: Annotated[
        int | None,
        typer.Option(metavar="N", help="Only if it leads to version N now; 0: only if it is new."),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Make or move an alias in one step; with --expect only from where you think it is.

    Example: loramux registry alias sums@4 prod --expect 3
    """
    with only_json(json), opened(root, url) as registry:
        about, number = _name(ref, tenant), None
        if remove:
            registry.drop_alias(about, name, expect=expect, actor=actor)
        else:
            number = find(registry, ref, tenant).version
            registry.set_alias(about, name, number, expect=expect, actor=actor)
    emit({"alias": f"{about}@{name}", "version": number}, json, _show_alias)


@app.command("share")
def share(
    ref: Annotated[str, typer.Argument(metavar="NAME", help="[tenant/]name, all its versions.")],
    receiver: Annotated[
        str, typer.Argument(metavar="TENANT", help="Who may use it; '*' is everyone.")
    ],
    remove: Annotated[bool, typer.Option("--remove", help="Take the share back.")] = False,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Let another tenant use a name, or no longer.

    Example: loramux registry share sums acme
    """
    about = _name(ref, tenant)
    with only_json(json), opened(root, url) as registry:
        (registry.unshare if remove else registry.share)(about, receiver, actor)
        result = {"name": about, "shared_with": list(registry.shared_with(about))}
    emit(result, json, lambda r: print(f"{r['name']}: {', '.join(r['shared_with']) or 'private'}"))


@app.command("delete")
def delete(
    ref: RefArgument,
    force: Annotated[
        bool, typer.Option("--force", help="With the aliases that lead to the version.")
    ] = False,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Delete a version, or without @version the whole name. Numbers are never given out again.

    Example: loramux registry delete sums@2
    """
    full = f"{_name(ref, tenant)}{ref[ref.index('@') :] if '@' in ref else ''}"
    with only_json(json), opened(root, url) as registry:
        gone = registry.delete(full, actor, force=force)
    result = {"name": _name(ref, tenant), "deleted": list(gone)}
    emit(result, json, lambda r: print(f"{r['name']}: deleted {', '.join(map(str, r['deleted']))}"))


@app.command("score")
def score(
    ref: RefArgument,
    suite: Annotated[str, typer.Argument(help="What it was measured by.")],
    task: Annotated[str, typer.Argument(help="On what.")],
    value: Annotated[float, typer.Argument(help="The measure.")],
    stderr: Annotated[float | None, typer.Option(help="Its standard error.")] = None,
    note: Annotated[str, typer.Option(help="How it was measured: command, rows, seed.")] = "",
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Note what a version reached on a task; `show` lists the notes.

    Example: loramux registry score sums@3 heldout sums 0.82 --stderr 0.02 --note "200 rows"
    """
    provenance = {"note": note} if note else {}
    with only_json(json), opened(root, url) as registry:
        version = find(registry, ref, tenant)
        registry.add_score(version, suite, task, value, stderr, provenance, actor)
        scores = [vars(one) for one in registry.scores(version)]
    result = {"ref": version.ref, "scores": scores}
    emit(result, json, lambda r: print(f"{r['ref']}: {len(r['scores'])} scores"))


@app.command("fsck")
def fsck(
    repair: Annotated[
        bool, typer.Option("--repair", help="Tidy leftovers of cut-off writes.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare sizes, do not read the bytes.")
    ] = False,
    grace: GraceOption = "24h",
    root: RootOption = None,
    url: UrlOption = None,
    blobs: BlobsOption = None,
    json: JsonOption = None,
) -> None:
    """Check every promise of the store; exit code 1 if one is broken. Leftovers are not an error.

    Example: loramux registry fsck --repair
    """
    with only_json(json), opened(root, url, blobs) as registry:
        report = registry.fsck(repair=repair, deep=not quick, grace_s=seconds("--grace", grace))
    emit(report.as_dict(), json, _show_fsck)
    if not report.is_clean:
        raise typer.Exit(1)


@app.command("collect")
def collect(
    grace: GraceOption = "24h",
    root: RootOption = None,
    url: UrlOption = None,
    blobs: BlobsOption = None,
    json: JsonOption = None,
) -> None:
    """Remove bytes that no version uses any more, once they are old enough.

    Example: loramux registry collect --grace 7d
    """
    with only_json(json), opened(root, url, blobs) as registry:
        report = registry.collect(seconds("--grace", grace))
    emit(report.as_dict(), json, _show_collect)


def seconds(option: str, text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if unit not in UNITS or not number.isdecimal():
        raise LoramuxError(f"{option} {text!r}: write a number and one of {', '.join(UNITS)}: 24h")
    return float(number) * UNITS[unit]


def _name(ref: str, tenant: str) -> str:
    from loramux.registry.names import parse_ref

    parsed = parse_ref(ref, tenant)
    return f"{parsed.tenant}/{parsed.name}"


def _show_alias(result: dict[str, Any]) -> None:
    leads = "gone" if result["version"] is None else f"version {result['version']}"
    print(f"{result['alias']}: {leads}")


def _show_fsck(report: dict[str, Any]) -> None:
    print(
        f"{report['num_versions']} versions, {report['num_blobs']} blobs, "
        f"{report['num_bytes']:,} bytes in use"
    )
    for what in ("missing", "damaged", "dangling", "untracked", "unfinished"):
        for line in report[what]:
            print(f"{what}: {line}")
    tidied = " (tidied)" if report["repaired"] else ""
    leftovers = len(report["untracked"]) + len(report["unfinished"])
    print(f"{'clean' if report['is_clean'] else 'NOT CLEAN'}, {leftovers} leftovers{tidied}")


def _show_collect(report: dict[str, Any]) -> None:
    print(
        f"removed {report['num_blobs']} blobs ({report['num_bytes']:,} bytes), "
        f"{report['num_temporary']} unfinished writes, {report['num_cached']} local copies; "
        f"{report['num_young']} unused blobs are too young"
    )
