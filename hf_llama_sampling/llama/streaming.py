"""Stream one row's text token by token, with the interface of transformers' streamers.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..text.growing import GrowingText
from ..text.stopping import StopStrings


class TextStreamer:
    """Write a single row's completion as text, token by token.

    Incomplete characters and possible stop-string starts are held back.

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
        self.text: GrowingText[None] | None = None  # None until the prompt was put

    def put(self, value: Any) -> None:
        """Take the prompt (1, T) first, then new ids (1,)."""
        if self.text is None:
            self.text = GrowingText(self.text_of, self.stops, is_byte=self.is_byte)
            return
        for token in value.flatten().tolist():
            self._write(piece for _, piece in self.text.add(token, None))

    def end(self) -> None:
        """Write the text that was held back."""
        if self.text is not None:
            released, end = self.text.end()
            self._write([*(piece for _, piece in released), end.text])
        self.text = None

    def _write(self, pieces: Any) -> None:
        for piece in pieces:
            if piece:
                self.write(piece)
