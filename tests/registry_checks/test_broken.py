"""Silently broken adapters are refused, each for the reason it is broken, and nothing of them stays behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fuzz.parcels import BASE, CONFIG, LINEARS, WEIGHTS, parcel
from loramux.registry.checks import CODES, UploadError, UploadLimits, check_upload, from_members
from registry_checks.broken import broken_adapters

HEADS = {path: (f"{path}(8, 8)".encode() + b"\0" * 64).hex() for path in LINEARS}
KNOWN = replace(BASE, heads=HEADS)


def test_three_hundred_broken_adapters_are_refused_with_the_code_of_their_fault(tmp_path: Path):
    cases = list(broken_adapters())
    assert len(cases) >= 300
    wrong = []
    for case in cases:
        try:
            with check_upload(from_members(case.files), KNOWN, staging=tmp_path):
                wrong.append(f"{case.label}: taken")
        except UploadError as error:
            if error.code != case.code:
                wrong.append(f"{case.label}: {error.code} instead of {case.code}: {error}")
            if str(tmp_path) in str(error):
                wrong.append(f"{case.label}: says where the copy lay")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.iterdir())
    used = Counter(case.code for case in cases)
    assert used.keys() <= CODES.keys()
    assert len(used) >= 28


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_rank": 3}, "rank_limit"),
        ({"max_bytes": 5000}, "too_large"),
        ({"max_members": 1}, "too_many_files"),
        ({"max_json_bytes": 100}, "too_large"),
        ({"max_header_bytes": 100}, "header_too_large"),
        ({"max_tensors": 15}, "too_many_tensors"),
        ({"max_norm": 1e-6}, "norm"),
        ({"min_norm": 1e6, "max_norm": 1e9}, "no_op"),
    ],
)
def test_every_limit_can_be_set_and_holds(limits, code):
    with (
        pytest.raises(UploadError) as caught,
        check_upload(from_members(parcel()), BASE, UploadLimits(**limits)),
    ):
        pass
    assert caught.value.code == code


def test_limits_are_positive():
    with pytest.raises(ValueError, match="max_rank, max_norm"):
        UploadLimits(max_rank=0, max_norm=-1.0)


@pytest.mark.parametrize(
    "address", ["https://example.org/a.zip", "s3://bucket/key", "hf://a/b", "file:///etc"]
)
def test_addresses_are_not_fetched(address):
    from loramux.registry.checks import from_archive, from_folder

    for make in (from_folder, from_archive):
        with pytest.raises(UploadError, match="nothing is fetched") as caught:
            make(address)
        assert caught.value.code == "remote"
    with (
        pytest.raises(UploadError),
        check_upload(from_members({CONFIG: address, WEIGHTS: address}), BASE),
    ):
        pass


def test_no_module_of_the_checks_can_open_a_connection():
    import ast

    import loramux.registry.checks as package

    banned = {
        "socket",
        "ssl",
        "http",
        "urllib",
        "requests",
        "httpx",
        "fsspec",
        "huggingface_hub",
        "subprocess",
    }
    for path in Path(package.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )
        }  # fmt: skip
        assert not names & banned, path.name


def test_every_code_and_limit_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "uploads.md").read_text()
    for code, meaning in CODES.items():
        assert f"| `{code}` | {meaning} |" in page
    for name in vars(UploadLimits()):
        assert f"`{name}`" in page
