"""Stop strings: find where a completion ends; callers cut its tokens and logprobs at `Cut.tokens`.

Decoded text leaves control tokens out, so a stop string that spells one (``<|im_end|>``) would never be met. In the
text that is searched, each of those that stop strings spell is one private-use character.

What this module does not do: it runs no model; `generation` asks the criterion after each step.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .tokens import INCOMPLETE

Stop = str | Sequence[str] | Sequence[Sequence[str] | None]
TextOf = Callable[[Sequence[int]], str]

_MARKS = 0xF0000  # the first of the characters that stand for control tokens


class Cut(NamedTuple):
    """Where a completion ends."""

    tokens: int  # leading tokens to keep: none holds a part of the stop string
    dropped: int  # characters to cut off the end of the completion's text
    reason: str | None  # the stop string; None if there was none


class StopStrings:
    """The strings that end each row.

    Args:
        stop: a string or several for all rows, or one list (or None) per row.
        rows: B.
        control_tokens: ids of the tokens that decoded text leaves out, by their spellings.

    Raises:
        TypeError: neither strings nor lists of strings.
        ValueError: an empty string, or lists for another number of rows.

    >>> StopStrings(["User:", "\\n\\n"], 1).find(0, "Yes.\\n\\nUser: No")
    (4, '\\n\\n')
    """

    def __init__(self, stop: Stop, rows: int, control_tokens: Mapping[str, int] | None = None) -> None:
        self.by_row = _strings_by_row(stop, rows)
        given = {string for strings in self.by_row for string in strings}
        spelled = [token for token in control_tokens or {} if any(token in string for string in given)]
        mark_of = {token: chr(_MARKS + place) for place, token in enumerate(sorted(spelled, key=len, reverse=True))}
        self.marks = {(control_tokens or {})[token]: mark for token, mark in mark_of.items()}
        self.searched = {string: _spellings(string, mark_of) for string in given}

    def __bool__(self) -> bool:
        return any(self.by_row)

    def of_rows(self, rows: Sequence[int]) -> "StopStrings":
        """Select some rows."""
        selected = copy.copy(self)
        selected.by_row = [self.by_row[row] for row in rows]
        return selected

    def shown(self, ids: Sequence[int], text_of: TextOf) -> str:
        """Decode tokens, with a mark for each control token that a stop string spells."""
        text = text_of(ids)
        for place in reversed(range(len(ids)) if self.marks else ()):
            if ids[place] in self.marks:
                at = len(text_of(ids[:place]))
                text = text[:at] + self.marks[ids[place]] + text[at:]
        return text

    def plain(self, text: str) -> str:
        """Drop the marks of a shown text."""
        return text.translate({ord(mark): None for mark in self.marks.values()}) if self.marks else text

    def find(self, row: int, text: str) -> tuple[int, str] | None:
        """Find the stop string that comes first in a row's shown text (the longest at that place), and its place."""
        found = [(text.find(spelling), spelling, string) for string, spelling in self._of_row(row)]
        first = min((each for each in found if each[0] >= 0), key=_first_and_longest, default=None)
        return None if first is None else (first[0], first[2])

    def settled(self, row: int, text: str) -> bool:
        """Whether the stop string that was found is final, whatever text follows.

        It is not final while the text's end may begin an earlier stop string, or a longer one at the same place.

        >>> stops = StopStrings(["o", "you"], 1)
        >>> [stops.settled(0, text) for text in ("y", "yo", "yol", "you")]
        [False, False, True, True]
        """
        found, known = self.find(row, text), text.rstrip(INCOMPLETE)
        if found is None:
            return False
        at, string = found
        longest = max(len(spelling) for spelling in self.searched[string] if text.startswith(spelling, at))
        return not any(
            (len(known) - size, -len(spelling)) < (at, -longest)
            for _, spelling in self._of_row(row)
            for size in range(1, len(spelling))
            if known.endswith(spelling[:size])
        )

    def held_back(self, row: int, text: str) -> int:
        """Count the characters at a text's end that may begin a stop string.

        >>> StopStrings("END", 1).held_back(0, "the EN")
        2
        """
        spellings = [spelling for _, spelling in self._of_row(row)]
        sizes = (size for string in spellings for size in range(1, len(string)) if text.endswith(string[:size]))
        return max(sizes, default=0)

    def criterion(self, prompts: Sequence[Sequence[int]], text_of: TextOf | Sequence[TextOf]) -> StoppingCriteria:
        """Make a stopping criterion for `generate`.

        Args:
            prompts: token ids of each row's prompt.
            text_of: decodes a completion's token ids: one function for all rows, or one for each.
        """
        decoders = [text_of] * len(prompts) if callable(text_of) else list(text_of)
        return _StopStringsCriterion(self, [len(prompt) for prompt in prompts], decoders)

    def cut(self, row: int, completion: Sequence[int], text_of: TextOf) -> Cut:
        """Find where a row's completion ends; drop a token that begins before the stop string and reaches into it."""
        text = self.shown(completion, text_of)
        found = self.find(row, text)
        if found is None:
            return Cut(len(completion), 0, None)
        at, string = found
        kept = len(completion)
        while kept and len(self.shown(completion[:kept], text_of)) > at:
            kept -= 1
        return Cut(kept, len(self.plain(text[at:])), string)

    def _of_row(self, row: int) -> list[tuple[str, str]]:
        """List a row's stop strings, each with what to search for."""
        return [(string, spelling) for string in self.by_row[row] for spelling in self.searched[string]]


class _StopStringsCriterion(StoppingCriteria):
    """True for rows whose stop string is final."""

    def __init__(self, stops: StopStrings, prompt_lens: list[int], decoders: list[TextOf]) -> None:
        self.stops, self.prompt_lens, self.decoders = stops, prompt_lens, decoders

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: (B, T), each row's own text. Returns (B,) bool."""
        rows = zip(input_ids.tolist(), self.prompt_lens, self.decoders, strict=True)
        met = [
            bool(self.stops.by_row[row]) and self.stops.settled(row, self.stops.shown(ids[length:], text_of))
            for row, (ids, length, text_of) in enumerate(rows)
        ]
        return torch.tensor(met, device=input_ids.device)


def _first_and_longest(found: tuple[int, str, str]) -> tuple[int, int]:
    at, spelling, _ = found
    return at, -len(spelling)


def _spellings(string: str, mark_of: Mapping[str, str]) -> list[str]:
    """List what to search for: the string, and the string with marks for the control tokens that it spells."""
    marked = string
    for token, mark in mark_of.items():  # the longest first
        marked = marked.replace(token, mark)
    return [string] if marked == string else [string, marked]


def _strings_by_row(stop: Any, rows: int) -> list[tuple[str, ...]]:
    if isinstance(stop, str):
        return [check_strings([stop])] * rows
    if not isinstance(stop, Sequence) or isinstance(stop, bytes):
        raise TypeError(f"stop must be a string, a list of strings, or such a list per row, got {stop!r}")
    if all(isinstance(string, str) for string in stop):
        return [check_strings(stop)] * rows
    if len(stop) != rows:
        raise ValueError(f"stop must be strings for all rows or one list per row, got {len(stop)} for {rows} rows")
    return [() if strings is None else check_strings(strings, f" for row {row}") for row, strings in enumerate(stop)]


def check_strings(strings: Any, where: str = "") -> tuple[str, ...]:
    """Check the stop strings of one row: a string, or several in a list."""
    listed = [strings] if isinstance(strings, str) else strings
    if not isinstance(listed, Sequence) or not all(isinstance(string, str) for string in listed):
        raise TypeError(f"stop must be a string, a list of strings, or such a list per row, got {strings!r}{where}")
    if "" in listed:
        raise ValueError(f"a stop string must hold at least one character, got an empty one{where}")
    return tuple(listed)
