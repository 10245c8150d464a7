"""Decode a text token by token, and release the characters and tokens that later tokens cannot change.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from .stopping import StopStrings
from .tokens import INCOMPLETE

Item = TypeVar("Item")


class End(NamedTuple):
    """How a text ended."""

    text: str  # text left over after the last token
    stop: str | None  # the stop string; None if there was none


class GrowingText(Generic[Item]):
    """One row's text, token by token, with an item (any value) per token.

    Hold back incomplete characters and possible stop-string starts, with the tokens that spell them.

    Args:
        text_of: decodes token ids.
        stops: the stop strings.
        row: the row whose stop strings apply.
        is_byte: tells byte tokens; None if later bytes never change the text of earlier ones.
    """

    def __init__(
        self,
        text_of: Callable[[Sequence[int]], str],
        stops: StopStrings | None = None,
        row: int = 0,
        is_byte: Callable[[int], bool] | None = None,
    ) -> None:
        self.stops = StopStrings([], row + 1) if stops is None else stops
        self.text_of = functools.partial(self.stops.shown, text_of=text_of)
        self.row, self.is_byte = row, is_byte
        self.has_stops = bool(self.stops.by_row[row])
        self.ids: list[int] = []
        self.text = ""  # as `StopStrings.shown` gives it
        self.known = 0  # characters of the text that later tokens cannot change
        self.ends: list[int] = []  # `known` after each token
        self.whole = 0  # length of the longest token prefix that decodes to whole characters
        self.waiting: list[Item] = []
        self.released = 0

    def add(self, token: int, item: Item) -> list[tuple[Item, str]]:
        """Add a token and its item; return the items that are now certain, with their texts."""
        self.ids.append(token)
        self.waiting.append(item)
        self.text = self.text_of(self.ids)
        if not self.text.endswith(INCOMPLETE) and not (self.is_byte and self.is_byte(token)):
            self._settle_waiting()
            self.known, self.whole = max(self.known, len(self.text)), len(self.ids)
        self.ends.append(self.known)
        if not self.has_stops:
            return self._release(len(self.ids))
        certain = self.known - self.stops.held_back(self.row, self.text[: self.known])
        return self._release(self._tokens_before(min(certain, self._stop()[0])))

    def end(self) -> tuple[list[tuple[Item, str]], End]:
        """End the text; return the remaining items, without those of a stop string, and how it ended."""
        if not self.ids:
            self.text = self.text_of([])
        at, string = self._stop()
        if string is None:
            released = self._release(len(self.ids))
            return released, End(self.stops.plain(self.text[self._sent :]), None)
        released = self._release(self._tokens_before(at))
        return released, End(self.stops.plain(self.text[self._sent : at]), string)

    def _settle_waiting(self) -> None:
        """Fix the text of earlier byte tokens, now that the next character is complete."""
        for place in range(max(self.whole, self.released), len(self.ids) - 1):
            before = self.text_of(self.ids[: place + 1]).rstrip(INCOMPLETE)
            if self.text.startswith(before):
                self.known = max(self.known, len(before))
            self.ends[place] = self.known

    @property
    def _sent(self) -> int:
        """Characters of the text that were released with tokens."""
        return self.ends[self.released - 1] if self.released else 0

    def _stop(self) -> tuple[int, str | None]:
        """Find where the text ends so far, and the stop string there, if any."""
        found = self.stops.find(self.row, self.text) if self.has_stops else None
        return (len(self.text), None) if found is None else found

    def _tokens_before(self, at: int) -> int:
        """Count the leading tokens that spell whole characters, all of them before the place `at`."""
        count = self.whole
        while count > self.released and len(self.text_of(self.ids[:count])) > at:
            count -= 1
        return count

    def _release(self, count: int) -> list[tuple[Item, str]]:
        first = self.released
        starts = [self._sent, *self.ends[first:count]]
        pieces = [self.stops.plain(self.text[a:b]) for a, b in itertools.pairwise(starts)]
        items, self.waiting = self.waiting[: len(pieces)], self.waiting[len(pieces) :]
        self.released = max(first, count)
        return list(zip(items, pieces, strict=True))
