"""The results as Markdown: a table per part, what was matched and how, and what failed or is absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loramux.report.comparison import PARTS

TITLES = PARTS
Result = Mapping[str, Any]


def markdown(result: Result) -> str:
    """Everything a page of results needs, as text."""
    blocks = [_head(result)]
    for name, part in result["parts"].items():
        if not part["methods"]:
            continue
        blocks += [f"## {TITLES[name]}", _about(part, result), _scores(part), _costs(part)]
    blocks += ["## Trainable parameters", _matched(result)]
    if result["failed"]:
        lines = "\n".join(f"* {one['row']}: {one['reason']}" for one in result["failed"])
        blocks += ["## Failed rows", lines]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(result: Result) -> str:
    rows = result["rows"]
    return (
        f"# {result['suite']}\n\nBase {result['base']}; {rows['done']} of {rows['planned']} rows, "
        f"{rows['failed']} failed. Scores are accuracies ({result['metric']}), the mean over tasks of each task's mean."
    )


def _about(part: Result, result: Result) -> str:
    tokens = "; ".join(
        f"{task} {', '.join(f'{number:,}' for number in numbers)}"
        for task, numbers in part["tokens"].items()
    )
    seen = f"Training tokens, the same for every method (per seed): {tokens}. " if tokens else ""
    return (
        f"{seen}± is the standard deviation over seeds, (±) the standard error over test rows. The difference is "
        f"paired against {part['reference']} over the same test rows and seeds; its interval is the 95 % interval of "
        "a bootstrap over test rows."
    )


def _scores(part: Result) -> str:
    columns = ["method", "mean", "seeds", f"minus {part['reference']}", *part["tasks"]]
    lines = []
    for entry in part["methods"]:
        each = [_value(entry["tasks"][task]["mean"]) for task in part["tasks"]]
        mean = _with_errors(entry)
        lines.append(
            [
                entry["method"],
                mean,
                str(len(entry["seeds"])),
                _difference(entry["difference"]),
                *each,
            ]
        )
    return table(columns, lines)


def _with_errors(entry: Result) -> str:
    text = _value(entry["mean"])
    if entry["spread"] is not None:
        text += f" ± {entry['spread']:.3f}"
    if entry["row_error"] is not None:
        text += f" (± {entry['row_error']:.3f})"
    return text


def _difference(found: Result | None) -> str:
    if found is None:
        return "-"
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] {found['says']}"


def _costs(part: Result) -> str:
    columns = (
        *("method", "class", "trained", "kept", "active", "train CPU s"),
        *("peak MB", "decode / bare"),
    )
    lines = []
    for entry in part["methods"]:
        decode = entry["decode"]
        ratio = "-"
        if decode is not None:
            ratio = f"{decode['value']:.2f} [{decode['low']:.2f}, {decode['high']:.2f}]"
        seconds = entry["train_seconds"]
        seconds = entry["make_seconds"] if seconds is None else seconds
        lines.append(
            [
                entry["method"],
                entry["servability"] or "-",
                *(_count(entry[name]) for name in ("trainable_at_end", "parameters", "active")),
                _value(seconds, 1),
                _value(entry["peak_mb"], 0),
                ratio,
            ]
        )
    extra = [
        f"{entry['method']} trained on {entry['extra_tokens']:,.0f} more tokens beforehand, per row."
        for entry in part["methods"]
        if entry["extra_tokens"]
    ]
    extra += [
        f"{entry['method']} read {entry['search_tokens']:,.0f} tokens in its search, without gradients, per row."
        for entry in part["methods"]
        if entry["search_tokens"]
    ]
    extra += [f"{entry['method']}: {note}" for entry in part["methods"] for note in entry["notes"]]
    return "\n\n".join([table(columns, lines), *extra])


def _matched(result: Result) -> str:
    lines = [
        [label, f"{one['parameters']:,}", f"{one['deviation']:+.2%}", one["how"], one["note"]]
        for label, one in result["matched"].items()
    ]
    text = f"Budget: {result['budget']:,}, routers and gates included."
    return (
        text + "\n\n" + table(["method", "trainable at the start", "off", "chosen", "note"], lines)
    )


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; names come first and are left-aligned."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    rows = [columns, rule, *lines]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows)


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _value(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:,.0f}"
