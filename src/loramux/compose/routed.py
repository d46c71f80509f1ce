"""Routers over frozen adapters that need no training, as a saved mixture: `loramux compose arrow`.

Why beside the merges: they answer the same question, what to do with trained adapters without training more. Routers
that start untrained (MoLE, LoRA-Flow, X-LoRA) begin with `loramux train`, which saves them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from loramux.compose.mergers import merger_names
from loramux.compose.write import check_out, replace
from loramux.errors import LoramuxError, suggest

UNTRAINED = ("arrow",)  # ready as soon as the adapters are read


def compose_router(
    method: str,
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    base: Any = None,
    force: bool = False,
    unused: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Attach the router to the base with these adapters and save the mixture; returns what was made.

    Options of the method are given by name, or as a mapping. unused: what else was asked for, to be refused by name.
    """
    settings = {**(options or {}), **more}
    _check(method, [*unused, *(key for key in ("name", "adapters") if key in settings)])
    if base is None:
        raise LoramuxError(
            f"{method} is a router over the adapters and is saved for its base; give --base"
        )
    folder = check_out(out, force, adapters)
    import loramux
    from loramux.eval.loading import Loaded, load_model

    config = loramux.config_from_dict(
        {"name": method, "adapters": [os.fspath(path) for path in adapters], **settings}
    )
    loaded = base if isinstance(base, Loaded) else load_model(base)
    handle = loramux.attach(loaded.model, config)
    try:
        (adapter,) = handle.adapters.values()
        replace(folder, lambda part: _save(handle, part))
        return {
            "out": str(folder),
            "method": method,
            "title": adapter.method.title,
            "servability": adapter.method.servability,
            "adapters": list(adapter.experts),
        }
    finally:
        handle.detach()


def _save(handle: Any, part: Any) -> None:
    handle.save(part)


def _check(method: str, unused: Sequence[str]) -> None:
    from loramux.methods import load_method, method_names

    if method not in UNTRAINED:
        if method in method_names() and load_method(method).needs_adapters:
            raise LoramuxError(
                f"{method} is a router that is trained over the adapters: write a recipe with method: "
                f"{{name: {method}, adapters: [...]}} and run `loramux train`"
            )
        names = [*merger_names(), *UNTRAINED]
        raise LoramuxError(
            f"nothing composes adapters by the name {method!r}; {suggest(method, names)}"
        )
    if unused:
        raise LoramuxError(f"{method} routes tokens by itself and takes no {', '.join(unused)}")
