"""Names in a config mean the same modules here as in PEFT."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loramux.formats import FormatError
from loramux.formats.patterns import PatternTable, compile_safely, target_test

PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "10", "mlp", "q_proj", "proj", "q-x"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
PLAIN_KEYS = st.builds(
    lambda anchor, parts, glue: anchor + glue.join(parts),
    st.sampled_from(["", "^"]),
    st.lists(PARTS, min_size=1, max_size=4),
    st.sampled_from([".", ".", "_", "..", ""]),
)
REGEX_KEYS = st.sampled_from(
    [
        r".*\.q_proj",
        r"layers\.(0|1)\.mlp",
        r"\d+",
        "q_proj$",
        "(q|x)_proj",
        "m[lo].*",
        "proj.?",
        "q_proj.",
    ]
)
KEYS = st.one_of(PLAIN_KEYS, REGEX_KEYS)


@given(PATHS, st.data())
@settings(max_examples=600, deadline=None)
def test_the_first_matching_pattern_decides_as_in_peft(path, data):
    endings = [path[at:].replace(".", dot) for at in range(len(path)) for dot in "._"]
    keys = data.draw(st.lists(KEYS | st.sampled_from(endings), max_size=6, unique=True))
    pattern = {key: index for index, key in enumerate(keys)}
    theirs = pattern.get(get_pattern_key(pattern.keys(), path), -1)
    assert PatternTable(pattern, "rank_pattern").find(path, -1) == theirs


NAMES = st.lists(st.one_of(PARTS, PATHS), min_size=1, max_size=3)
LAYERS = st.one_of(st.none(), st.just([]), st.sampled_from([0, 1, [0, 1], [10]]))


@given(
    st.one_of(NAMES, REGEX_KEYS),
    st.one_of(st.none(), NAMES, st.just(r".*\.mlp")),
    LAYERS,
    st.sampled_from([None, "layers", ["h", "layers"], []]),
    PATHS,
)
@settings(max_examples=600, deadline=None)
def test_a_module_is_a_target_exactly_when_it_is_one_in_peft(
    targets, excluded, layers, names, path
):
    fields: dict[str, Any] = {"target_modules": targets, "exclude_modules": excluded}
    if isinstance(targets, list) and layers is not None:
        fields |= {"layers_to_transform": layers, "layers_pattern": names}
    theirs = bool(check_target_module_exists(LoraConfig(**fields), path))
    assert target_test(fields)(path) == theirs


def test_a_rank_for_each_of_a_thousand_sites_is_found_without_compiling_a_pattern_each():
    paths = [f"model.layers.{i}.mlp.{n}" for i in range(200) for n in ("a", "b", "c", "d", "e")]
    table = PatternTable({path: index for index, path in enumerate(paths)}, "rank_pattern")
    assert [table.find(path, -1) for path in paths] == list(range(1000))
    assert not table._regexes
    assert table.unused(dict.fromkeys(paths[10:])) == list(range(10))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(.*){9}x",
        "a*b*c*d*",
        "(",
        "x" * 5000,
        "[[a",
        "*",
        ".?" * 30 + "Z",
        "(a|.)" * 30,
        "(?x)#[\n.*",
    ],
)
def test_patterns_that_do_not_compile_or_may_never_end_are_refused(pattern):
    with pytest.raises(FormatError) as caught:
        compile_safely(pattern, "alpha_pattern")
    assert caught.value.code == "bad_pattern"


@pytest.mark.parametrize(
    "pattern",
    [
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r".*\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"model\.layers\.(\d+)\.(?:mlp|self_attn)\.[a-z?|(]+_proj",
        r"(?:.*?\.)?q_proj",
    ],
)
def test_patterns_as_people_write_them_are_taken(pattern):
    assert compile_safely(pattern, "target_modules").pattern == pattern


def test_a_layers_pattern_with_alternatives_or_groups_is_no_crash():
    given = {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "x|layers"}
    assert target_test(given)("model.layers.1.q") and not target_test(given)("model.layers.0.q")
    with pytest.raises(FormatError, match="layers_pattern"):
        target_test(given | {"layers_pattern": "(?P<idx>a)"})


def test_scales_are_those_of_the_papers():
    from loramux.formats.scaling import rank_and_scale

    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"b": 16}, "alpha_pattern": {"x.b": 3}}
    assert rank_and_scale(config, "m.a", 4) == (4, 8, 2.0)
    assert rank_and_scale(config, "x.b", 16) == (16, 3, 3 / 16)
    assert rank_and_scale(config | {"use_rslora": True}, "y.b", 16) == (16, 8, 8 / math.sqrt(16))
