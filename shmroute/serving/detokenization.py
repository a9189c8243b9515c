"""Tokens to text, one at a time, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
"""What a decoder gives for bytes that are no UTF-8, so also for the first bytes of an unfinished character."""

CONTEXT = 6
"""Tokens of the prompt that are decoded along: what a token's text is (a leading blank!) depends on those before it."""


class Detokenizer:
    """The text of a growing sequence of tokens.

    A token's text is the difference between decoding with and without it, over a short window that begins where text
    was last complete. While the window's text ends in an unfinished character, nothing is given out.

    Parameters
    ----------
    decode : callable
        Text of a list of token ids.
    prompt : sequence of int
        What comes before; not part of the text.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(prompt[-CONTEXT:])
        self._shown = len(self._window)

    def add(self, token: int) -> str:
        """One more token; the text that it completes, perhaps none."""
        self._window.append(token)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._shown :]
        self._shown = len(self._window)
        return text

    def flush(self) -> str:
        """The text of unfinished characters, at the end of the sequence."""
        text = self._new_text()
        self._shown = len(self._window)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._shown])
        return self._decode(self._window)[len(before) :]
