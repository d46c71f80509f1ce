"""The programs on the engine's page run as they stand, over a tiny base."""

import asyncio
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import loramux
from pico import build_pico, pico_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "engine.md"
BASE = '"smollm2-135m"'


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's programs, with the adapters they name beside them and a tiny base in place of the real one."""
    base = tmp_path / "base"
    build_pico("llama").save_pretrained(base)
    pico_tokenizer().save_pretrained(base)
    for seed, name in enumerate(("law", "tone")):
        torch.manual_seed(seed)
        handle = loramux.attach(build_pico("llama"), loramux.LoraConfig(r=4))
        for parameter in handle.trainable_parameters().values():
            parameter.data += 0.05 * torch.randn_like(parameter)
        handle.save(tmp_path / "runs" / name / "adapter")
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert all(program.count(BASE) == 1 for program in found)
    return [program.replace(BASE, repr(str(base))) for program in found]


def test_the_first_program_answers_base_adapter_and_mix(
    programs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, Any] = {}
    exec(programs[0], scope)
    base, law, mix = (done for (done,) in scope["answers"])
    assert (base.answered.parts, base.error, law.error, mix.error) == ((), None, None, None)
    assert [(name, weight) for name, _, weight in law.answered.parts] == [("law", 1.0)]
    assert [(name, weight) for name, _, weight in mix.answered.parts] == [
        ("law", 0.7),
        ("tone", 0.3),
    ]
    assert len(capsys.readouterr().out.splitlines()) >= 3


def test_the_async_program_streams_and_generates(
    programs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    body = "async def main():\n" + textwrap.indent(programs[1], "    ") + "\n    return answers"
    scope: dict[str, Any] = {"loramux": loramux}
    exec(body, scope)
    answers = asyncio.run(scope["main"]())
    assert [done.error for (done,) in answers] == [None, None]
    assert len(answers) == 2
    assert capsys.readouterr().out


def test_the_page_shows_two_programs(programs: list[str]) -> None:
    assert len(programs) == 2
