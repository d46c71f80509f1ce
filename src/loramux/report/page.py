"""The parts a report is made of (sections, pictures with their tables) and the page they become.

Why a template with automatic escaping and a JSON block: names of adapters, tasks and linears come from files of others
and must not become markup, and whoever doubts a picture must be able to read its numbers back from the same file.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 400  # of a table; the JSON block has all
DPI = 120


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; columns that hold no number are set left."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    @property
    def left(self) -> frozenset[int]:
        return frozenset(
            i
            for i in range(len(self.columns))
            if i == 0 or any(isinstance(row[i], str) and row[i] for row in self.rows)
        )

    @property
    def cut(self) -> str:
        more = len(self.rows) - MAX_ROWS
        return f"{more} more rows are in the JSON block of this file." if more > 0 else ""

    def cells(self) -> list[list[str]]:
        return [[shown(value) for value in row] for row in self.rows[:MAX_ROWS]]


@dataclass(frozen=True)
class Picture:
    """A PNG. `alt` says what it shows to those who do not see it, `caption` how to read it."""

    data: bytes
    alt: str
    caption: str
    table: Table | None = None

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


@dataclass(frozen=True)
class Section:
    """Pictures and tables under one heading. `records` are its numbers, for the JSON block."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    records: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def anchor(self) -> str:
        kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in self.title.lower())
        return kept.strip("-") or "section"


@dataclass(frozen=True)
class Missing:
    """What a report could not show, and how to get it."""

    what: str
    how: str


@dataclass
class Report:
    """A page in the making."""

    title: str
    lead: str = ""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)

    def add(self, part: Section | Missing | None) -> None:
        if isinstance(part, Section):
            self.sections.append(part)
            for key, value in part.records.items():
                before = self.records.get(key)
                # Sections of several jobs write under one key, each under its job's name.
                if isinstance(before, dict) and isinstance(value, Mapping):
                    value = {**before, **value}
                self.records[key] = value
        elif part is not None:
            self.missing.append(part)

    def html(self) -> str:
        """The page as text. Loads nothing from elsewhere and runs no script."""
        from markupsafe import Markup

        text: str = (
            environment()
            .get_template("run.html.j2")
            .render(
                title=self.title,
                lead=self.lead,
                tiles=self.tiles,
                sections=self.sections,
                missing=[(part.what, part.how) for part in self.missing],
                settings=json.dumps(self.settings, indent=2, default=str, ensure_ascii=False)
                if self.settings
                else "",
                records=Markup(json_block(self.records)),
            )
        )
        return text


def environment() -> Any:
    """Jinja with escaping on, reading the templates of this package."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def load(name: str) -> str:
        return files("loramux.report").joinpath(name).read_text(encoding="utf-8")

    return Environment(
        loader=FunctionLoader(load),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def json_block(value: Any) -> str:
    """JSON that can stand inside a script element: no character of it can end the element or start another."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def finite(value: Any) -> Any:
    """NaN and infinities are not JSON: they become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(figure: Figure, alt: str, caption: str, table: Table | None = None) -> Picture:
    """The figure as a PNG. All colours are kept: a palette would save half the bytes and shift rare values."""
    from PIL import Image

    canvas: Any = figure.canvas
    figure.set_dpi(DPI)
    canvas.draw()  # `savefig` would draw twice
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    small = io.BytesIO()
    drawn.convert("RGB").save(small, format="PNG")
    return Picture(small.getvalue(), alt, caption, table)
