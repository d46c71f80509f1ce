"""The reference pages, made from the code: every verb of the command line, every operation of the server.

Why generated: a page written by hand is wrong after the next option. `make reference` writes them, a test compares.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

MADE = "<!-- Made by `make reference` from the code; changes go there. -->"
NO_DEFAULT: tuple[Any, ...] = (None, False, "", (), [])


def cli_reference() -> str:
    """Markdown of all verbs with their arguments, options and defaults, in the order of `loramux --help`."""
    from loramux.cli.main import app

    parts = [
        MADE,
        "# The command line",
        "Exit codes: 0 done, 1 our fault, 2 yours to fix, 130 interrupted.",
    ]
    for path, command in _commands("loramux", typer.main.get_command(app)):
        parts += [f"## {path}", _prose(command.help), *_parameters(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def http_reference(schema: Mapping[str, Any]) -> str:
    """Markdown of an OpenAPI schema: per operation what it does, its parameters, bodies and answers."""
    parts = [MADE, "# The HTTP interface"]
    for path, item in schema["paths"].items():
        for verb, operation in item.items():
            parts += [f"## {verb.upper()} {path}", _prose(_said(operation))]
            parts += _http_parameters(operation)
            parts += _http_body(operation, schema)
            answers = [
                f"| {code} | {_cell(answer.get('description', ''))} |"
                for code, answer in operation.get("responses", {}).items()
            ]
            parts.append("\n".join(["| status | meaning |", "| --- | --- |", *answers]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _said(operation: Mapping[str, Any]) -> str:
    """The summary as a sentence, then what else there is to say."""
    said = (operation.get("summary", ""), operation.get("description", ""))
    return "\n\n".join(f"{text.rstrip('.')}." for text in said if text)


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, sub in getattr(command, "commands", {}).items():
        if sub.hidden:
            continue
        if getattr(sub, "commands", None):
            yield from _commands(f"{path} {name}", sub)
        else:
            yield f"{path} {name}", sub


def _prose(text: str | None) -> str:
    """A docstring as Markdown; an example becomes code, up to the next empty line."""
    out: list[str] = []
    is_example = False
    for line in inspect.cleandoc(text or "").replace("\f", "").split("\n"):
        is_example = bool(line) and (is_example or line.startswith("Example:"))
        out.append(f"    {line.removeprefix('Example:').strip()}" if is_example else line)
    return "\n".join(out)


def _parameters(command: Any) -> list[str]:
    rows = [
        _row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)
    ]
    if not rows:
        return []
    return ["\n".join(["| argument or option | meaning | default |", "| --- | --- | --- |", *rows])]


def _row(parameter: Any) -> str:
    if parameter.opts == [parameter.name]:
        name = parameter.metavar or parameter.name.upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
        if not getattr(parameter, "is_flag", False):
            name += f" {parameter.metavar or parameter.name.upper()}"
    default = "required" if parameter.required else _default(parameter.default)
    return f"| `{name}` | {_cell(parameter.help or '')} | {default} |"


def _default(value: Any) -> str:
    if value in NO_DEFAULT or callable(value):
        return ""
    return f"`{_cell(str(getattr(value, 'value', value)))}`"


def _http_parameters(operation: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| `{p['name']}` | {p['in']} | {_kind(p.get('schema', {}))} | {_cell(p.get('description', ''))} |"
        for p in operation.get("parameters", ())
    ]
    return (
        ["\n".join(["| parameter | in | type | meaning |", "| --- | --- | --- | --- |", *rows])]
        if rows
        else []
    )


def _http_body(operation: Mapping[str, Any], schema: Mapping[str, Any]) -> list[str]:
    parts = []
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        body = _resolved(content.get("schema", {}), schema)
        required = set(body.get("required", ()))
        rows = [
            f"| `{name}`{' (required)' if name in required else ''} | {_kind(field)} | "
            f"{_cell(field.get('description', ''))} |"
            for name, field in body.get("properties", {}).items()
        ]
        parts.append(f"Body: `{media}`")
        if rows:
            parts.append("\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows]))
    return parts


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        target: Any = schema
        for key in node["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        node = target
    return node


def _kind(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        return str(field["$ref"]).rsplit("/", 1)[-1]
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {})) or 'any'}"
    choices = field.get("anyOf") or field.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_kind(choice) for choice in choices))
    return str(field.get("type", "any"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def openapi_schema() -> dict[str, Any]:
    """What a server without keys says of itself at /openapi.json; with keys every call also needs one."""
    from loramux.server.app import create_app
    from loramux.server.config import parse_config
    from loramux.server.services import Services
    from loramux.server.stub import StubEngine, StubRegistry, StubTokenizer

    services = Services(engine=StubEngine(), registry=StubRegistry(), tokenizer=StubTokenizer())
    schema: dict[str, Any] = create_app(parse_config({"base": "any"}), services).openapi()
    return schema


def write(folder: Path) -> list[Path]:
    """Write both pages; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"cli.md": cli_reference(), "http.md": http_reference(openapi_schema())}
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in pages]


if __name__ == "__main__":
    for path in write(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")):
        print(path)
