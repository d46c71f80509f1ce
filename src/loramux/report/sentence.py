"""What the routers decide over one sentence: gate weights, token by token.

Letters: T tokens of the sentence, C columns (experts or modules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loramux.report.charts import Axis, Scale, heat_maps, pick
from loramux.report.page import Missing, Picture, Section, Table, picture
from loramux.report.plots import short_name
from loramux.report.records import router_names
from loramux.report.routing import normalised_entropy

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_TOKENS = 96
MOST_ROUTERS = 5


@dataclass(frozen=True)
class Gates:
    """One router over the sentence: weights [T, C], or [1, C] where it decides once for the whole prompt."""

    path: str
    layer: int
    when: str
    columns: tuple[str, ...]
    weights: NDArray[np.float64]
    entropy: NDArray[np.float64]


def observe_sentence(
    model: Any, tokenizer: Any, sentence: str, task: str | None = None
) -> tuple[list[str], list[Gates]]:
    """The tokens and every router's gates over them; the sentence is all prompt, at most MAX_TOKENS of it.

    task: for routers that go by the task.
    """
    import torch

    from loramux.core.attach import handle_of
    from loramux.errors import LoramuxError

    handle = handle_of(model)
    assert handle is not None
    ids = tokenizer(sentence)["input_ids"][:MAX_TOKENS]
    if not ids:
        raise LoramuxError("the sentence has no tokens; give it at least one word")
    tokens = [tokenizer.decode([token]) for token in ids]
    inputs = torch.tensor([ids], device=model.device)
    # Not inference mode: in it, token routers skip their records.
    with torch.no_grad():
        model(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            use_cache=False,
            logits_to_keep=1,
            tasks=[task],
        )
    return tokens, [_gates(record) for record in handle.routing()]


def _gates(record: Any) -> Gates:
    weights = record.gates.detach().double().cpu().numpy()
    probs = weights if record.probs is None else record.probs.detach().double().cpu().numpy()
    return Gates(
        record.path,
        record.layer,
        record.when,
        tuple(record.columns),
        weights,
        normalised_entropy(np.abs(probs)),
    )


def sentence_section(
    sentence: str,
    tokens: Sequence[str],
    gates: Sequence[Gates],
    names: Sequence[str] = (),
    heading: str = "One sentence",
) -> Section | Missing:
    """Pictures of the gates; `names` are those of the experts, where they have any."""
    if not gates:
        return Missing(
            "Gate weights over a sentence",
            "the adapter has no router: every token gets the same rows",
        )
    by_token = [
        entry for entry in gates if entry.when == "token" and len(entry.weights) == len(tokens)
    ]
    by_prompt = [entry for entry in gates if entry.when != "token"]
    figures = []
    if by_token:
        figures += [_tokens_picture(tokens, by_token, names), _layers_picture(tokens, by_token)]
    if by_prompt:
        figures.append(_prompt_picture(by_prompt, names))
    records = {
        "sentence": {
            "text": sentence,
            "tokens": list(tokens),
            "routers": [
                {
                    "path": g.path,
                    "when": g.when,
                    "columns": list(g.columns),
                    "weights": np.round(g.weights, 5).tolist(),
                }
                for g in _recorded(gates, len(tokens))
            ],
        }
    }
    text = f"“{sentence}” as {len(tokens)} tokens, all of it prompt."
    if len(tokens) == MAX_TOKENS:
        text += f" Only the first {MAX_TOKENS} tokens are read."
    return Section(heading, text, figures=figures, records=records)


def _recorded(gates: Sequence[Gates], tokens: int) -> list[Gates]:
    """The routers whose weights go into the file: all, or evenly spread ones where that would be megabytes."""
    numbers = sum(entry.weights.size for entry in gates)
    if numbers <= 150_000:
        return list(gates)
    most = max(MOST_ROUTERS, 150_000 * len(gates) // numbers)
    return [gates[i] for i in pick(len(gates), most)]


def _labels(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """Experts by their names where the columns are their numbers."""
    if len(names) == len(columns) and all(column == str(i) for i, column in enumerate(columns)):
        return list(names)
    return [short_name(column) for column in columns]


def _words(tokens: Sequence[str]) -> list[str]:
    return [token.strip() or "␣" if token.strip() != "\n" else "⏎" for token in tokens]


def _tokens_picture(tokens: Sequence[str], gates: Sequence[Gates], names: Sequence[str]) -> Picture:
    """Experts over tokens for some routers, first and last among them."""
    shown = [gates[i] for i in pick(len(gates), MOST_ROUTERS)]
    routers = router_names([entry.path for entry in gates])
    panels = [(f"router {routers[i]}", gates[i].weights.T) for i in pick(len(gates), MOST_ROUTERS)]
    rows = [Axis(_labels(entry.columns, names), "expert") for entry in shown]
    words = Axis(_words(tokens), slanted=True)
    figure = heat_maps(panels, rows, words, Scale("gate weight", number=".2f"), across=1)
    order = max(shown, key=lambda entry: float(np.abs(entry.weights).max()))
    t, c = np.unravel_index(int(np.abs(order.weights).argmax()), order.weights.shape)
    alt = (
        f"Gate weights of {len(shown)} routers over {len(tokens)} tokens; largest {order.weights[t, c]:.2f}, for "
        f"expert {_labels(order.columns, names)[c]} at token {int(t) + 1} in {order.path}."
    )
    caption = f"Weight of each expert at each token, for {len(shown)} of {len(gates)} routers, evenly spread."
    return picture(figure, alt, caption, _top_table(tokens, shown, names))


def _top_table(tokens: Sequence[str], gates: Sequence[Gates], names: Sequence[str]) -> Table:
    """The two heaviest experts of every token."""
    rows = []
    for t, token in enumerate(tokens):
        cells = []
        for entry in gates:
            labels = _labels(entry.columns, names)
            top = np.argsort(-np.abs(entry.weights[t]), kind="stable")[:2]
            cells.append(", ".join(f"{labels[c]} {entry.weights[t, c]:.3f}" for c in top))
        rows.append([t + 1, repr(token)[1:-1], *cells])
    return Table(
        (
            "place",
            "token",
            *(f"router {name}" for name in router_names([entry.path for entry in gates])),
        ),
        rows,
        "The two heaviest experts",
    )


def _layers_picture(tokens: Sequence[str], gates: Sequence[Gates]) -> Picture:
    """Layers over tokens: how undecided every router is."""
    table = np.array([entry.entropy for entry in gates])
    figure = heat_maps(
        [("", table)],
        Axis(router_names([entry.path for entry in gates]), "router"),
        Axis(_words(tokens), slanted=True),
        Scale("entropy (0 decided, 1 undecided)", low=None, high=1.0, number=".2f"),
    )
    alt = f"Entropy of {len(gates)} routers over {len(tokens)} tokens, from {table.min():.2f} to {table.max():.2f}."
    rows = [
        [entry.path, float(e.min()), float(e.mean()), float(e.max())]
        for entry, e in zip(gates, table, strict=True)
    ]
    numbers = Table(("router", "lowest", "mean", "highest"), rows)
    return picture(figure, alt, "How undecided each router is at each token.", numbers)


def _prompt_picture(gates: Sequence[Gates], names: Sequence[str]) -> Picture:
    """Columns over layers: one decision for the whole sentence."""
    columns = list(dict.fromkeys(column for entry in gates for column in entry.columns))
    table = np.full((len(gates), len(columns)), np.nan)
    for row, entry in zip(table, gates, strict=True):
        for column, weight in zip(entry.columns, entry.weights[0], strict=True):
            row[columns.index(column)] = weight
    labels = _labels(columns, names)
    figure = heat_maps(
        [("", table)],
        Axis(router_names([entry.path for entry in gates]), "router"),
        Axis(labels, slanted=not all(label.isdigit() for label in labels)),
        Scale("weight for this prompt", crosses=True, number=".2f"),
    )
    off = int((table == 0).sum())
    alt = f"Weights of {len(gates)} prompt routers over {len(columns)} columns; {off} are switched off."
    rows = [[entry.path, *row] for entry, row in zip(gates, table.tolist(), strict=True)]
    numbers = Table(("router", *labels), rows)
    return picture(
        figure, alt, "Weights decided once for the whole sentence; a cross: switched off.", numbers
    )
