"""A tokenizer of single bytes, and data files written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.byte_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Any:
    def write(*rows: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write
