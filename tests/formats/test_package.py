"""The package keeps its promises about itself: light to import, no PEFT, no pickle."""

import ast
import subprocess
import sys
from pathlib import Path

import loramux.formats

FILES = sorted(Path(loramux.formats.__file__).parent.glob("*.py"))

PROGRAM = """
import sys, loramux.formats
assert "torch" not in sys.modules, "loramux.formats imports torch"
import loramux.formats.mixlora, loramux.formats.mixture
heavy = {"peft", "transformers", "datasets"} & set(sys.modules)
assert not heavy, f"reading imports {heavy}"
"""


def test_reading_imports_neither_peft_nor_transformers_and_the_error_alone_not_even_torch():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)


def test_nothing_here_can_unpickle():
    assert len(FILES) > 10
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load")}, path
