"""The text of one choice as it grows, and why it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

from shmroute.serving.detokenization import Detokenizer
from shmroute.serving.stop_strings import StopStrings


class AnswerText:
    """Takes tokens, gives text, and sees the end.

    Deterministic: tokens given anew, as after the death of a worker, give the same text in the same pieces.

    Parameters
    ----------
    decode : callable
        Text of a list of token ids.
    prompt : sequence of int
    stop : sequence of str
    eos : collection of int
        Tokens that end the text and are not part of it.
    max_tokens : int

    Attributes
    ----------
    ended : str or None
        ``"stop"`` after an end token or a stop string, ``"length"`` after `max_tokens` tokens, else None.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt: Sequence[int],
        stop: Sequence[str],
        eos: Collection[int],
        max_tokens: int,
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stop = StopStrings(stop)
        self._eos, self._left = eos, max_tokens
        self.ended: Literal["stop", "length"] | None = None

    def add(self, token: int) -> str:
        """One more token; the text that may be shown now and was not before."""
        assert self.ended is None
        self._left -= 1
        if token in self._eos:
            self.ended = "stop"
            return self._rest("")
        text = self._stop.add(self._detokenizer.add(token))
        if self._stop.matched:
            self.ended = "stop"
        elif self._left == 0:
            self.ended = "length"
            return self._rest(text)
        return text

    def _rest(self, text: str) -> str:
        """`text` and all that was held back. An unfinished character may complete a stop string."""
        text += self._stop.add(self._detokenizer.flush())
        if self._stop.matched:
            self.ended = "stop"
            return text
        return text + self._stop.flush()
