"""Turns an answer's tokens into text as they come, and ends it at stop texts.

Why not decode each token: a character may be spread over several tokens (bytes), and some tokenizers drop the space of
a first word. So the text so far is that of a window of tokens that starts in the prompt; what is released is what
further tokens cannot change:
- the last few U+FFFD of the text are held back, as they may be the beginning of a character;
- the longest end of the text that a stop text begins with is held back until it is told apart.

A stop text may lie across tokens; it and what follows are never released. Special tokens give no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

UNFINISHED = "\ufffd"
MOST_UNFINISHED = 3  # a character of 4 bytes may lack its last; some tokenizers show each byte
CONTEXT = 6  # tokens before the ones to come that a window keeps
WINDOW = 24  # tokens, beyond which it is cut back
MOST_WINDOW = 96  # where no place to cut is found (bytes that are no text)


class Decoder(Protocol):
    """The part of a transformers tokenizer that is used."""

    def decode(self, token_ids: Any, **options: Any) -> Any: ...


class Detokenizer:
    """The text of one answer. `push` and `finish` return what to append to what was released before.

    Do not push tokens that end the answer (end of text, `stop_token_ids`): they are not part of it. When `stopped_by`
    is set the answer is over: `text` is all of it, and more tokens give nothing. Stop texts that end within the first
    `min_tokens` tokens are text like any other.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._num_pushed = 0
        self._released: list[str] = []
        self._held = ""  # text of the answer that is not released yet
        self._num_free = 0  # of _held: a stop text that ends in it does not count
        self._window = list(prompt[-WINDOW:])
        self._cut_back(self._decode(self._window))
        self._done = ""  # text of the window that is accounted for
        self._num_done = 0  # tokens of the window whose text is accounted for to the last byte
        self._grow()

    @property
    def text(self) -> str:
        """All that was released."""
        return "".join(self._released)

    def push(self, token: int) -> str:
        """Add a token of the answer; returns the text that it released."""
        if self.stopped_by is not None:
            return ""
        self._window.append(token)
        self._num_pushed += 1
        self._held += self._grow()
        return self._release(is_last=False)

    def finish(self) -> str:
        """The answer is over: release what was held back."""
        if self.stopped_by is not None:
            return ""
        self._held += self._grow(is_last=True)
        self._window, self._done, self._num_done = [], "", 0
        return self._release(is_last=True)

    def _decode(self, tokens: list[int]) -> str:
        if not tokens:
            return ""
        # Clean-up would rewrite spaces that were released already.
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _grow(self, is_last: bool = False) -> str:
        """What the window's text grew by, without an unfinished character at its end (with it, if nothing follows)."""
        full = self._decode(self._window)
        num_unfinished = len(full) - len(full.rstrip(UNFINISHED))
        everything = is_last or len(self._window) > MOST_WINDOW
        settled = full if everything else full[: len(full) - min(num_unfinished, MOST_UNFINISHED)]
        if not settled.startswith(self._done):
            # Some tokenizers show each byte of a run as U+FFFD unless all of them are valid together, which takes back
            # text that was released. Go on from there: the run began before, so what is left starts with its bytes.
            del self._window[: self._num_done]
            self._done, self._num_done = "", 0
            return self._grow(is_last)
        grown = settled[len(self._done) :]
        self._done = settled
        if settled == full:
            self._num_done = len(self._window)
            if len(self._window) > WINDOW:
                self._cut_back(full)
        return grown

    def _cut_back(self, full: str) -> None:
        """Drop tokens from the window's front, where that leaves the text of the others as it is."""
        for num in range(CONTEXT, min(2 * CONTEXT, len(self._window))):
            kept = self._window[-num:]
            text = self._decode(kept)
            if text and full.endswith(text):
                self._window, self._done, self._num_done = kept, text, num
                return
        if len(self._window) > MOST_WINDOW:
            self._window, self._done, self._num_done = [], "", 0

    def _release(self, is_last: bool) -> str:
        """Move what no stop text can take back from the held text to the released."""
        cut = self._find_stop()
        if cut is None:
            kept = 0 if is_last else _overlap(self._held, self._stop)
            cut = len(self._held) - kept
        out, self._held = self._held[:cut], self._held[cut:]
        self._num_free = max(0, self._num_free - cut)
        if out:
            self._released.append(out)
        return out

    def _find_stop(self) -> int | None:
        """Where in the held text the first stop text begins; sets `stopped_by`."""
        if self._num_pushed <= self._min_tokens:
            self._num_free = len(self._held)
            return None
        found = []
        for text in self._stop:
            at = self._held.find(text, max(0, self._num_free - len(text) + 1))
            if at >= 0:
                found.append((at, text))
        if not found:
            return None
        cut, self.stopped_by = min(found)
        return cut


def _overlap(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop text begins with, short of all of it."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
