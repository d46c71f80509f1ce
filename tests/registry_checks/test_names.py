"""Names: what is allowed is ASCII, short and has one spelling; everything else is one error, and never a path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.hostile_names import FIXED, hostile_names
from loramux.registry.checks import UploadError
from loramux.registry.checks.stage import member_path
from loramux.registry.names import (
    RESERVED,
    NameProblem,
    Ref,
    check_alias,
    check_name,
    check_tenant,
    parse_ref,
    parse_version,
)

COUNT = 20_000
REF = re.compile(
    r"[a-z0-9][a-z0-9-]{0,62}/[a-z0-9][a-z0-9._-]{0,127}@(\d+|[a-z][a-z0-9._-]{0,63}|sha256:[0-9a-f]{64})"
)
CHECKS = (check_tenant, check_name, check_alias, parse_version, parse_ref, member_path)


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("poet", Ref("local", "poet", "latest")),
        ("poet@3", Ref("local", "poet", 3)),
        ("acme/poet@prod", Ref("acme", "poet", "prod")),
        ("acme/poet.v2_x-1@sha256:" + "0f" * 32, Ref("acme", "poet.v2_x-1", "sha256:" + "0f" * 32)),
        ("0/0@1", Ref("0", "0", 1)),
        ("a" * 63 + "/" + "b" * 128 + "@" + "c" * 64, Ref("a" * 63, "b" * 128, "c" * 64)),
    ],
)
def test_a_reference_says_tenant_name_and_version(text, ref):
    assert parse_ref(text) == ref
    assert parse_ref(str(ref)) == ref, "and is written the way it is read"


def test_a_version_is_a_number_an_alias_or_a_digest():
    assert parse_ref("a@7").alias is None is parse_ref("a@7").digest
    assert parse_ref("a@prod").alias == "prod"
    assert parse_ref("a@sha256:" + "ab" * 32).digest == "ab" * 32


def test_without_a_default_the_tenant_must_be_named():
    assert parse_ref("acme/a", None).tenant == "acme"
    with pytest.raises(NameProblem, match="names no tenant"):
        parse_ref("a", None)


@pytest.mark.parametrize("word", sorted(RESERVED))
def test_words_of_the_server_are_no_names(word):
    with pytest.raises(NameProblem, match="reserved"):
        check_name(word)


def test_hostile_names_are_refused_with_one_error_that_shows_no_control_codes():
    names = list(hostile_names(COUNT))
    assert len(names) == COUNT
    refused = 0
    for name in names:
        for check in CHECKS:
            found, error = outcome(check, name)
            if error is None:
                assert_harmless(check, name, found)
            else:
                refused += 1
                assert error.code in ("bad_name", "archive_name")
                text = str(error)
                assert text.isascii() and text.isprintable() and len(text) < 500
    assert refused > 5 * COUNT


def outcome(check, value):
    try:
        return check(value), None
    except (NameProblem, UploadError) as error:
        return None, error


def assert_harmless(check, name, found):
    if check is parse_ref:
        assert REF.fullmatch(str(found)), (name, found)
    elif check is member_path:
        parts = Path(found).parts
        assert name in (found, f"./{found}") and found.isascii() and found.isprintable()
        assert not Path(found).is_absolute() and not set(parts) & {".", ".."}
        assert "\\" not in found and ":" not in found and "/".join(parts) == found
    else:
        assert str(found) == name and name.isascii() and name == name.lower()
        assert not set(name) & set("/\\@:*+ %\x00"), name


def test_no_name_of_the_fixed_list_is_an_adapters_name():
    for name in FIXED:
        with pytest.raises(NameProblem):
            check_name(name)


@given(
    st.text(max_size=300) | st.none() | st.integers() | st.binary(max_size=20) | st.lists(st.text())
)
def test_whatever_is_given_the_answer_is_a_reference_or_one_error(value):
    ref, error = outcome(parse_ref, value)
    assert REF.fullmatch(str(ref)) if error is None else error.code == "bad_name"


def test_names_and_checks_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import loramux.registry.names, loramux.registry.checks, loramux.registry.checks.mixtures\n"
        "from fuzz.parcels import BASE, parcel\n"
        "from loramux.registry.checks import check_upload, from_members\n"
        "with check_upload(from_members(parcel()), BASE) as checked: print(checked.digest)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch("[0-9a-f]{64}", done.stdout.strip())
