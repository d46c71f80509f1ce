"""Streamed text equals the text of the whole, whatever the tokenizer, and stop texts never show."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loramux.engine.detokenize import MOST_WINDOW, Detokenizer
from pico import pico_tokenizer

TEXT = "Grüße an die Welt: 日本語, 😀👩‍👩‍👧 and naïve façades.\n  déjà vu, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢! the end"


def byte_level_tokenizer():
    """Every byte is a token, like the lowest level of GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab |= {"<eos>": 256, "Ġthe": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def byte_fallback_tokenizer():
    """Words with a leading mark, bytes for all else, and no space before the first word: like Llama 2's."""
    words = ["▁the", "▁end", "a", "b", "▁", "ü", "▁und"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    vocab |= {word: 256 + i for i, word in enumerate(words)} | {"<eos>": 270, "<unk>": 271}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(detokenizer, tokens):
    """The pieces of an answer; the last one is that of `finish`."""
    pieces = [detokenizer.push(token) for token in tokens]
    return [*pieces, detokenizer.finish()]


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def byte_fallback():
    return byte_fallback_tokenizer()


def test_streamed_bytes_give_the_text_of_the_whole(byte_level):
    tokens = byte_level.encode(TEXT)
    pieces = stream(Detokenizer(byte_level), tokens)
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("split", range(0, 40, 3))
def test_text_continues_that_of_the_prompt_wherever_it_ends(byte_level, split):
    tokens = byte_level.encode(TEXT)
    before = len(whole(byte_level, tokens[:split]).rstrip("\ufffd"))
    made = Detokenizer(byte_level, tokens[:split])
    assert "".join(stream(made, tokens[split:])) == TEXT[before:] == made.text


def test_each_character_is_released_as_soon_as_it_is_whole(byte_level):
    detokenizer = Detokenizer(byte_level)
    pieces = [detokenizer.push(token) for token in byte_level.encode("aü😀b")]
    assert pieces == ["a", "", "ü", "", "", "", "😀", "b"]


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.one_of(st.integers(0, 255), st.sampled_from([0xF0, 0x9F, 0x98, 0x80, 0xC3, 0xA9, 0x41])),
        max_size=80,
    )
)
def test_bytes_that_are_no_text_give_what_decoding_them_together_gives(data):
    tokenizer = byte_level_tokenizer()
    tokens = byte_ids(tokenizer, data)
    assert "".join(stream(Detokenizer(tokenizer), tokens)) == whole(tokenizer, tokens)


def byte_ids(tokenizer, data):
    symbols = _byte_symbols()
    return [tokenizer.convert_tokens_to_ids(symbols[byte]) for byte in data]


def _byte_symbols():
    """GPT-2's table: printable bytes stand for themselves, the others follow from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def test_an_endless_broken_character_neither_waits_nor_grows_the_window(byte_level):
    token = byte_ids(byte_level, [0x98])[0]
    detokenizer = Detokenizer(byte_level)
    released = ""
    for _ in range(500):
        released += detokenizer.push(token)
        assert len(detokenizer._window) <= MOST_WINDOW + 1
    assert len(released) >= 490
    assert released + detokenizer.finish() == "\ufffd" * 500


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="ab ü日😀é\n", max_size=60), split=st.integers(0, 60))
def test_a_tokenizer_with_byte_fallback_gives_the_text_with_its_spaces(text, split):
    tokenizer = byte_fallback_tokenizer()
    tokens = []
    for char in text:
        known = tokenizer.convert_tokens_to_ids(char.replace(" ", "▁"))
        is_word = known != tokenizer.unk_token_id
        tokens += [known] if is_word else list(char.encode())
    prompt = [tokenizer.convert_tokens_to_ids("a"), *tokens[:split]]
    want = "a" + text
    before = whole(tokenizer, prompt)
    got = "".join(stream(Detokenizer(tokenizer, prompt), tokens[split:]))
    if "\ufffd" not in before:
        assert got == want[len(before) :]


def test_a_first_word_keeps_its_space(byte_fallback):
    the, end = byte_fallback.convert_tokens_to_ids(["▁the", "▁end"])
    assert stream(Detokenizer(byte_fallback, [the]), [end, the]) == [" end", " the", ""]


def test_text_after_a_broken_character_is_shown(byte_fallback):
    letter = byte_fallback.convert_tokens_to_ids("a")
    data = [*"é".encode(), 0xC3, *[letter] * 12]
    assert "".join(stream(Detokenizer(byte_fallback, [letter]), data)) == "é\ufffd" + "a" * 12


def test_special_tokens_give_no_text(byte_level):
    eos = byte_level.eos_token_id
    tokens = [eos, *byte_level.encode("ab"), eos, *byte_level.encode("c")]
    assert "".join(stream(Detokenizer(byte_level, [eos, eos]), tokens)) == "abc"


def pico_stream(text, **options):
    tokenizer = pico_tokenizer()
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("Q: "), **options)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped_by is not None:
            break
    return [*pieces, detokenizer.finish()], detokenizer


@pytest.mark.parametrize(
    ("text", "stop", "want", "by"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("one two three", ["o"], "", "o"),
        ("aaab", ["aab"], "a", "aab"),
        ("ababac tail", ["abac"], "ab", "abac"),
        ("one two", ["two three"], "one two", None),
        ("one two", [], "one two", None),
        ("xyz", ["xyz", "yz", "z"], "", "xyz"),
        ("one\n\nUser: hi", ["\n\nUser:"], "one", "\n\nUser:"),
    ],
)
def test_text_ends_before_the_first_stop_text(text, stop, want, by):
    pieces, detokenizer = pico_stream(text, stop=stop)
    assert "".join(pieces) == detokenizer.text == want
    assert detokenizer.stopped_by == by


def test_nothing_of_a_stop_text_is_released_before_it_is_told_apart():
    pieces, _ = pico_stream("see (b) or (/end", stop=["(/end)"])
    assert pieces == [*"see ", "", "(b", ")", *" or ", "", "", "", "", "", "(/end"]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="abc", max_size=30),
    stops=st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_streamed_stops_equal_a_search_in_the_whole_text(text, stops):
    # The first to be complete ends the answer, and of those the first to begin.
    ends = [text.find(s) + len(s) for s in stops if s in text]
    want = text
    if ends:
        seen = text[: min(ends)]
        want = seen[: min(seen.find(s) for s in stops if s in seen)]
    pieces, detokenizer = pico_stream(text, stop=stops)
    assert "".join(pieces) == want
    assert (detokenizer.stopped_by is not None) == bool(ends)


def test_stop_texts_count_only_after_min_tokens():
    assert "".join(pico_stream("one one one", stop=["one"], min_tokens=3)[0]) == "one "
    assert "".join(pico_stream("one one one", stop=["one"], min_tokens=2)[0]) == ""
    assert "".join(pico_stream("one one one", stop=["one"], min_tokens=9)[0]) == "one one "
    assert "".join(pico_stream("one one one", stop=["one"], min_tokens=11)[0]) == "one one one"
    # "ab" is over when it counts, but held back as the beginning of "abc".
    assert "".join(pico_stream("abx", stop=["ab", "abc"], min_tokens=2)[0]) == "abx"
    assert "".join(pico_stream("abc", stop=["ab", "abc"], min_tokens=2)[0]) == ""


def test_after_a_stop_nothing_more_is_released():
    detokenizer = pico_stream("one two", stop=["two"])[1]
    assert detokenizer.push(20) == "" and detokenizer.finish() == ""
    assert detokenizer.text == "one "


def test_a_stop_text_may_lie_inside_one_token(byte_level):
    the = byte_level.convert_tokens_to_ids("Ġthe")
    detokenizer = Detokenizer(byte_level, stop=["th"])
    assert [detokenizer.push(token) for token in (the, the)] == [" ", ""]
    assert detokenizer.stopped_by == "th"


def test_long_answers_are_decoded_in_short_windows(byte_level):
    text = "".join(random.Random(0).choices("abcdef ghij\n", k=600))
    longest = 0

    class Counting:
        def decode(self, ids, **options):
            nonlocal longest
            longest = max(longest, len(ids))
            return byte_level.decode(ids, **options)

    tokens = byte_level.encode(text)
    assert "".join(stream(Detokenizer(Counting(), tokens[:200]), tokens[200:])) == text[200:]
    assert longest < 40
