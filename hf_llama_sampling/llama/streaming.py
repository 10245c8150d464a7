"""Text as its tokens come: a streamer for one row, in the manner of transformers' streamers.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .stopping import StopStrings

_INCOMPLETE = "\ufffd"  # stands for bytes that do not make a character yet


class TextStreamer:
    """Hand a single row's completion to `write` as text, as its tokens come.

    Bytes that do not make a character yet are held back, and so is what may become a stop string.

    Args:
        text_of: decodes token ids.
        write: is given each new piece of text.
        stops: stop strings of the row; nothing from the first on is written.
    """

    def __init__(
        self,
        text_of: Callable[[Sequence[int]], str],
        write: Callable[[str], object],
        stops: StopStrings | None = None,
    ) -> None:
        self.text_of = text_of
        self.write = write
        self.stops = StopStrings([], 1) if stops is None else stops
        self.ids: list[int] | None = None  # None before the prompt has passed
        self.written = 0

    def put(self, value: Any) -> None:
        """The prompt (1, T) first, then new ids (1,)."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.text_of(self.ids)
        if not text.endswith(_INCOMPLETE):
            self._write(text, len(text) - self.stops.held_back(0, text))

    def end(self) -> None:
        """Write what was held back."""
        text = self.text_of(self.ids or [])
        self._write(text, len(text))
        self.ids, self.written = None, 0

    def _write(self, text: str, until: int) -> None:
        found = self.stops.find(0, text)
        until = until if found is None else min(until, found[0])
        if until > self.written:
            self.write(text[self.written : until])
            self.written = until
