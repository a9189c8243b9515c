"""Stop strings in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through until one of some strings is complete in it.

    What might be the beginning of one is held back until it is known not to be. The result does not depend on how the
    text is cut into pieces: the string that is complete first ends it, of several the longest.

    Parameters
    ----------
    strings : sequence of str
        None of them empty.

    Attributes
    ----------
    matched : bool
        Whether the text has ended.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty string would stop everything"
        self._strings = strings
        self._held = ""
        self.matched = False

    def add(self, text: str) -> str:
        """One more piece; what of the text so far may be shown now and was not before."""
        assert not self.matched
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._strings if (start := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            return text[: min(found)[1]]
        kept = self._beginning_at_end(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _beginning_at_end(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._strings), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._strings):
                return length
        return 0
