"""Text as its tokens come: a streamer for one row, in the manner of transformers' streamers.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..text.growing import GrowingText
from ..text.stopping import StopStrings


class TextStreamer:
    """Hand a single row's completion to `write` as text, as its tokens come.

    Bytes that do not make a character yet are held back, and so is what may become a stop string.

    Args:
        text_of: decodes token ids.
        write: is given each new piece of text.
        stops: stop strings of the row; nothing from the first on is written.
        is_byte: see `GrowingText`.
    """

    def __init__(
        self,
        text_of: Callable[[Sequence[int]], str],
        write: Callable[[str], object],
        stops: StopStrings | None = None,
        is_byte: Callable[[int], bool] | None = None,
    ) -> None:
        self.text_of, self.write, self.stops, self.is_byte = text_of, write, stops, is_byte
        self.text: GrowingText[None] | None = None  # None before the prompt has passed

    def put(self, value: Any) -> None:
        """The prompt (1, T) first, then new ids (1,)."""
        if self.text is None:
            self.text = GrowingText(self.text_of, self.stops, is_byte=self.is_byte)
            return
        for token in value.flatten().tolist():
            self._write(piece for _, piece in self.text.add(token, None))

    def end(self) -> None:
        """Write what was held back."""
        if self.text is not None:
            released, end = self.text.end()
            self._write([*(piece for _, piece in released), end.text])
        self.text = None

    def _write(self, pieces: Any) -> None:
        for piece in pieces:
            if piece:
                self.write(piece)
