"""Which module a name in adapter_config.json means: PEFT's own rules, made safe and quick.

Why not PEFT's functions: importing it takes seconds. Why safe: the keys are regular expressions from a file, and Python
has no time limit for a match. Why quick: an adapter with a rank of its own at every site has hundreds of keys.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from loramux.formats.errors import FormatError

T = TypeVar("T")

MODULE_PATH = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")
MAX_PATH = 256
MAX_PATTERN = 2048
MAX_REPEATS = 3
MAX_STEPS = 2**21  # of one match, by `worst_steps` for a path of USUAL_PATH letters
USUAL_PATH = 64

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.-]*[A-Za-z0-9_-]")
_GROUP_REPEAT = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|\{\d*,\d*\}")
_ESCAPE_OR_SET = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
# Not those that make a quantifier lazy or begin a group.
_OPTIONAL = re.compile(r"(?<![*+?}(])\?")
_COMMENTS = re.compile(
    r"\(\?[a-zA-Z]*x"
)  # verbose mode: what a pattern says is not what it looks like


def compile_safely(pattern: str, field: str) -> re.Pattern[str]:
    """Compile a pattern out of a file; refuse the shapes whose matching time explodes."""
    if (
        len(pattern) > MAX_PATTERN
        or _GROUP_REPEAT.search(pattern)
        or _COMMENTS.search(pattern)
        or len(_REPEAT.findall(pattern)) > MAX_REPEATS
        or worst_steps(pattern) > MAX_STEPS
    ):
        raise FormatError(
            f"{field}: pattern {pattern[:80]!r} repeats a group, has more than {MAX_REPEATS} repeats or too many "
            "alternatives, which can take for ever to match; write the module names out instead",
            code="bad_pattern",
        )
    try:
        with warnings.catch_warnings():
            # "Possible nested set" and the like: the pattern is the file's, not ours to mend.
            warnings.simplefilter("ignore")
            return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{field}: {pattern[:80]!r} is no regular expression: {error}", code="bad_pattern"
        ) from None


def worst_steps(pattern: str, length: int = USUAL_PATH) -> float:
    """At most about so many ways are tried before a path of this length is found not to match.

    Repeats share the letters between them; every optional part doubles, every group of alternatives multiplies.
    """
    plain = _ESCAPE_OR_SET.sub("a", pattern)
    repeats = len(_REPEAT.findall(plain))
    ways = float(length**repeats / math.factorial(repeats))
    ways *= 2.0 ** min(len(_OPTIONAL.findall(plain)), 1000)
    open_groups = [1]
    for letter in plain:
        if letter == "(":
            open_groups.append(1)
        elif letter == "|":
            open_groups[-1] += 1
        elif letter == ")" and len(open_groups) > 1:
            ways = min(ways * open_groups.pop(), 1e300)
    return ways * math.prod(open_groups)


class PatternTable(Generic[T]):
    """rank_pattern or alpha_pattern: the first key that matches the end of a path at a dot (or all of it) wins.

    PEFT's test is `re.match(rf"(.*\\.)?({key})$", path)`. Plain keys, whose dots stand for any character, are looked up
    by (length, positions of dots, anchored) instead: hundreds of full paths would take longer to compile than to load.
    """

    def __init__(self, pattern: Mapping[str, T] | None, field: str):
        self._values: list[T] = []
        self._plain: dict[tuple[int, tuple[int, ...], bool], dict[str, int]] = {}
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        for order, (key, value) in enumerate((pattern or {}).items()):
            self._values.append(value)
            if _PLAIN.fullmatch(key):
                body = key.removeprefix("^")
                dots = tuple(i for i, letter in enumerate(body) if letter == ".")
                group = self._plain.setdefault((len(body), dots, key.startswith("^")), {})
                group.setdefault(body, order)
            else:
                compile_safely(key, field)
                self._regexes.append((order, compile_safely(rf"(.*\.)?({key})$", field)))

    def find(self, path: str, default: T) -> T:
        if not self._values:
            return default
        order = self._first(path)
        return default if order is None else self._values[order]

    def unused(self, paths: Iterable[str]) -> list[int]:
        """Positions of keys that decide for none of these paths."""
        if not self._values:
            return []
        used = {self._first(path) for path in paths}
        return [order for order in range(len(self._values)) if order not in used]

    def _first(self, path: str) -> int | None:
        best = min(self._plain_matches(path), default=None)
        for order, regex in self._regexes:
            if best is not None and order > best:
                break
            if regex.match(path):
                return order
        return best

    def _plain_matches(self, path: str) -> Iterator[int]:
        for (length, dots, anchored), keys in self._plain.items():
            ahead = len(path) - length
            if ahead < 0 or (ahead and (anchored or path[ahead - 1] != ".")):
                continue
            tail = list(path[ahead:])
            for dot in dots:
                tail[dot] = "."
            order = keys.get("".join(tail))
            if order is not None:
                yield order


def target_test(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """PEFT's check of target_modules, exclude_modules, layers_to_transform and layers_pattern, for one module path."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    is_excluded = _any_name(excluded, "exclude_modules") if excluded else _never
    if targets is None or targets == "all-linear":
        # PEFT asks the model here; the file alone cannot say more.
        return lambda path: not is_excluded(path)
    if isinstance(targets, str):
        is_target = _any_name(targets, "target_modules")
        return lambda path: not is_excluded(path) and is_target(path)
    in_layer = _layer_test(config)
    exact, endings = frozenset(targets), tuple(f".{name}" for name in targets)
    # A full path is meant whatever its layer; only endings are limited to layers_to_transform.
    return lambda path: (
        not is_excluded(path) and (path in exact or (path.endswith(endings) and in_layer(path)))
    )


def _any_name(names: str | list[str], field: str) -> Callable[[str], bool]:
    if isinstance(names, str):
        regex = compile_safely(names, field)
        return lambda path: regex.fullmatch(path) is not None
    exact = frozenset(names)
    endings = tuple(f".{name}" for name in names)
    return lambda path: path in exact or path.endswith(endings)


def _layer_test(config: Mapping[str, Any]) -> Callable[[str], bool]:
    indexes, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if indexes is None or indexes == []:
        return _always
    wanted = frozenset([indexes] if isinstance(indexes, int) else indexes)
    if not patterns:
        regexes = [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    else:
        names = [patterns] if isinstance(patterns, str) else patterns
        for name in names:
            compile_safely(name, "layers_pattern")
        # In a group of its own: the alternatives of a name must not end before the index.
        whole = [rf"(?:^|.*?\.)(?:{name})\.(?P<idx>\d+)\." for name in names]
        regexes = [compile_safely(pattern, "layers_pattern") for pattern in whole]

    def test(path: str) -> bool:
        match = next((m for regex in regexes if (m := regex.match(path))), None)
        return match is not None and int(match["idx"]) in wanted

    return test


def _never(path: str) -> bool:
    return False


def _always(path: str) -> bool:
    return True
