"""`loramux generate`: continue prompts, greedily unless a temperature is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loramux.cli.output import JsonOption, emit, only_json


def generate(
    base: Annotated[str, typer.Option(metavar="DIR", help="Folder, fetch name or hub id.")],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="A prompt; repeatable.")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="A saved adapter.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="New tokens at most.")] = 64,
    task: Annotated[
        bool, typer.Option("--task", help='Ask as in the task data: "Question: TEXT, Answer:".')
    ] = False,
    task_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The task, for adapters that go by tasks (moelora)."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the chat template.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Sample; without it the answer is greedy.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="With a temperature.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: that of the base.")] = None,
    json: JsonOption = None,
) -> None:
    """Continue one or more prompts.

    Example: loramux generate --base smollm2-135m --adapter runs/demo/adapter --task
    --prompt "What does this command ask for? Play some jazz"
    """
    from loramux.eval.generate import generate as run

    with only_json(json):
        result = run(
            base,
            adapter,
            prompt,
            max_tokens,
            chat=chat,
            template="task" if task else None,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            threads=threads,
            dtype=dtype,
            task=task_name,
        )
    emit(result, json, _show)


def _show(result: dict[str, Any]) -> None:
    several = len(result["results"]) > 1
    for row in result["results"]:
        if several:
            print(f"> {row['prompt']}")
        print(row["text"])
