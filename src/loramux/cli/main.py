"""The `loramux` command: verbs, global options, and how errors reach the user.

Why a wrapper around typer: an error that is the user's to fix is one line and exit code 2, everything else a traceback.
Exit codes: 0 done, 1 our fault, 2 the user's to fix, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from loramux.cli import (
    batch,
    bench,
    compare,
    compose,
    config,
    demo,
    doctor,
    fetch,
    generate,
    jobs,
    key,
    lower,
    methods,
    registry_change,
    report,
    serve,
    serve_demo,
    tenant,
    tenants,
    train,
    verify,
)
from loramux.cli import eval as eval_
from loramux.errors import LoramuxError

DEBUG_ENV = "LORAMUX_DEBUG"
# Options that take several values at once, and what such a value looks like. After the first, a folder ends the files
# of --data and a recipe or suite ends the words of --only: they are arguments of the verb.
MANY = {
    "--data": re.compile(r"[^-]"),
    "--adapters": re.compile(r"[^-]"),
    "--tasks": re.compile(r"[^-]"),
    "--set": re.compile(r"[\w.-]+="),
    "--only": re.compile(r"(?!.*\.ya?ml$)[^-]"),
    "--weights": re.compile(r"-?\d*\.?\d+(e[+-]?\d+)?$"),
}

app = typer.Typer(
    name="loramux",
    help="Train, measure and run mixtures of LoRA experts on unmodified transformers models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("fetch")(fetch.fetch)
app.command("train")(train.train)
app.command("jobs")(jobs.jobs)
app.command("eval")(eval_.evaluate)
app.command("generate")(generate.generate)
app.command("batch")(batch.batch)
app.command("compose")(compose.compose)
app.command("lower")(lower.lower)
app.command("doctor")(doctor.doctor)
app.command("methods")(methods.methods)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.command("tenants")(tenants.tenants)
app.command("serve")(serve.serve)
app.command("serve-demo")(serve_demo.serve_demo)
app.command("verify")(verify.verify)
app.add_typer(config.app, name="config")
app.add_typer(tenant.app, name="tenant")
app.add_typer(key.app, name="key")
app.add_typer(registry_change.app, name="registry")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"loramux {version('loramux')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", envvar=DEBUG_ENV, help="Show tracebacks and debug messages.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of every verb."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("loramux").setLevel(logging.DEBUG if debug else logging.INFO)


def main(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    args = spread(argv)
    debug = "--debug" in args or os.environ.get(DEBUG_ENV, "") not in ("", "0")
    if "--debug" in args:
        args = ["--debug", *(arg for arg in args if arg != "--debug")]
    try:
        app(args=args, prog_name="loramux")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if debug or not is_for_the_user(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))


def spread(argv: Sequence[str]) -> list[str]:
    """`--data a b` as `--data a --data b`: one option name may be followed by several values."""
    out: list[str] = []
    many: str | None = None
    for arg in argv:
        if many is not None and MANY[many].match(arg):
            first = out[-1] == many
            if first or many != "--data" or not os.path.isdir(arg):
                out += [arg] if first else [many, arg]
                continue
        out.append(arg)
        if arg.startswith("-") or many is None or out[-2] != many:
            many = arg if arg in MANY else None
    return out


def is_for_the_user(error: ValueError) -> bool:
    """Ours by type, or a plain ValueError that our own code raised (and not torch, deep inside)."""
    if isinstance(error, LoramuxError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).split(".")[0] == "loramux"


if __name__ == "__main__":
    run()
