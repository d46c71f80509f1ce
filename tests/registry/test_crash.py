"""Killed at any point of publishing, the registry is whole and goes on.

More kills: `python -m loramux.registry.crash --kills 1000`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from postgres import fresh_schema
from registry.conftest import KINDS

KILLS = {"sqlite": 40, "postgresql": 10}


@pytest.mark.parametrize("kind", KINDS)
def test_kills_while_publishing_tear_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "loramux.registry.crash", "--kills", str(KILLS[kind])]
    if kind == "postgresql":
        command += ["--url", fresh_schema(request.getfixturevalue("postgres_url"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["kills"] == KILLS[kind]
    # It would prove little if no kill had fallen inside a publish, or nothing had ever been published.
    assert found["acknowledged"] > 0 and found["with_leftovers"] > 0
    assert len(found["last_steps"]) >= 3


def test_the_registry_works_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'peft')))\n"
        "from loramux.registry.crash import main; sys.exit(main(['--kills', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
