"""Text as its tokens come: a streamer for one row, in the manner of transformers' streamers.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # stands for bytes that do not make a character yet


class TextStreamer:
    """Hand a single row's completion to `write` as text, as its tokens come.

    Bytes that do not make a character yet are held back.

    Args:
        text_of: decodes token ids.
        write: is given each new piece of text.
    """

    def __init__(self, text_of: Callable[[Sequence[int]], str], write: Callable[[str], object]) -> None:
        self.text_of = text_of
        self.write = write
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
            self.write(text[self.written :])
            self.written = len(text)

    def end(self) -> None:
        """Write what was held back."""
        self.write(self.text_of(self.ids or [])[self.written :])
        self.ids, self.written = None, 0
