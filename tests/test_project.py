"""The shape of the project: import direction, public names, file sizes, start-up time, packaging."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loramux

ROOT = Path(__file__).parent.parent
PACKAGE = Path(loramux.__file__).parent
MAX_LINES = 400
MAX_IMPORT_SECONDS = 1.0  # of processor time, interpreter included
MODULES = sorted(PACKAGE.rglob("*.py"))

# A package may import from itself, from lower layers, and from the leaves.
LAYERS = {
    "ops": 0,
    "core": 1,
    "methods": 2,
    "formats": 3,
    "persist": 4,
    "api": 4,
    "compose": 5,
    "data": 5,
    "train": 5,
    "eval": 5,
    "engine": 6,
    "report": 6,
    "registry": 6,
    "tenancy": 7,
    "retrieval": 7,
    "server": 8,
    "bench": 9,
    "compare": 9,
    "demo": 9,
    "cli": 10,
    "__main__": 11,
}
LEAVES = {"errors", "recipe", "fetch"}
# Leaves are read by everybody, so they may only look at each other; the recipe asks `methods` by name.
ALLOWED_IN_LEAVES = {"errors": set(), "fetch": {"errors"}, "recipe": {"errors", "methods"}}
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "pandas", "numpy", "peft")


def part_of(path: Path) -> str:
    """The package or module directly under loramux."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of loramux that a file imports, wherever in the file; types-only imports do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = {name.split(".")[1] for name in names if name.startswith("loramux.")}
    known = set(LAYERS) | LEAVES
    return {part for part in parts if part in known}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_in_one_direction(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return  # the public names, resolved when first used
    used = imported_parts(path) - {part}
    if part in LEAVES:
        assert used <= ALLOWED_IN_LEAVES[part]
        return
    assert part in LAYERS, f"{part} has no place in the import order yet; give it one here"
    wrong = {other for other in used - LEAVES if LAYERS[other] > LAYERS[part]}
    assert not wrong, f"{name_of(path)} imports {sorted(wrong)} from above"


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_files_stay_small_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "split it"
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "starts with a docstring"


def test_public_names_are_listed_and_real() -> None:
    assert sorted(loramux.__all__) == sorted(set(loramux.__all__)) == sorted(dir(loramux))
    for name in loramux.__all__:
        assert getattr(loramux, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'attatch'"):
        _ = loramux.attatch  # type: ignore[attr-defined]


def test_the_documented_entry_points_are_public() -> None:
    assert set(loramux.__all__) >= {
        *("attach", "load", "LoraConfig", "MiLoRAConfig", "MixLoRAConfig", "MoLEConfig"),
        *("Handle", "config_from_dict", "load_method", "list_methods", "__version__"),
    }


def fresh(code: str) -> dict[str, object]:
    """Run code in a new interpreter; it prints one JSON object last."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


TIMED = """
import json, resource, sys
{statement}
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = used.ru_utime + used.ru_stime
print(json.dumps({{"seconds": seconds, "heavy": [m for m in {heavy} if m in sys.modules]}}))
"""


def test_importing_loramux_is_quick_and_imports_nothing_heavy() -> None:
    code = TIMED.format(statement="import loramux", heavy=HEAVY)
    # The best of three: the first run may find a cold disk.
    runs = [fresh(code) for _ in range(3)]
    assert all(run["heavy"] == [] for run in runs)
    assert min(float(str(run["seconds"])) for run in runs) < MAX_IMPORT_SECONDS


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    statement = "from loramux.cli.main import main; main(['train', '--help'])"
    assert fresh(TIMED.format(statement=statement, heavy=HEAVY))["heavy"] == []


def test_the_package_ships_its_types_its_data_and_its_kernels() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert (PACKAGE / "ops" / "lora.c").exists()
    assert (PACKAGE / "demo" / "demo.yaml").exists()
    assert (PACKAGE / "demo" / "data" / "NOTICE.md").exists()
    assert len(list((PACKAGE / "bench" / "traces").glob("*.jsonl"))) == 2


def test_the_demo_recipe_is_the_one_that_the_demo_runs() -> None:
    shown, run = ROOT / "recipes" / "demo.yaml", PACKAGE / "demo" / "demo.yaml"
    assert shown.read_bytes() == run.read_bytes()


def test_the_demo_runs_on_every_core_and_never_with_an_empty_thread_number() -> None:
    dry = ["make", "-n", "demo", "OMP_NUM_THREADS=1"]
    shown = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = next(line for line in shown.splitlines() if line.endswith("loramux demo"))
    assert command.startswith("env -u OMP_NUM_THREADS OMP_WAIT_POLICY=PASSIVE ")


def test_the_version_is_one_number() -> None:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == loramux.__version__


def test_the_readme_starts_with_the_two_commands() -> None:
    first, second = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:2]
    assert first.strip().startswith("make demo")
    assert second.strip().startswith("make test")


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    gone = [target for target in targets if target and not (page.parent / target).exists()]
    assert not gone, f"{page.relative_to(ROOT)} links to {gone}"


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, name_of(path)
        assert "weights_only=False" not in text, name_of(path)
