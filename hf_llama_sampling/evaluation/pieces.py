"""A text as the pieces that its tokens spell: they add up to the text, and none is half a character.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

_INCOMPLETE = "\ufffd"  # stands for bytes that do not make a character yet
_LONGEST = 32  # tokens of a piece; a character of 18 bytes, as family emoji are made of, is below

TextOf = Callable[[Sequence[int]], str]


class Piece(NamedTuple):
    """Characters of a text, and the tokens that spell them: one, or several where each alone is no whole character."""

    text: str
    start: int  # characters before it
    first: int  # its tokens are first, ..., last - 1
    last: int


def pieces_of(ids: Sequence[int], text_of: TextOf) -> list[Piece]:
    r"""The pieces of a text; their texts joined are `text_of(ids)`, and their tokens joined are `ids`.

    A token is decoded after the piece before it, since decoders drop the blank that a text begins with.

    >>> pieces_of([367, 542], llama.text_of)
    [Piece(text='The', start=0, first=0, last=1), Piece(text=' king', start=3, first=1, last=2)]
    """
    whole = text_of(ids)
    pieces: list[Piece] = []
    start = before = first = 0  # characters so far, first token of the piece before, first of this one
    known = ""  # the text of the piece before, decoded alone
    for last in range(1, len(ids) + 1):
        text = text_of(ids[before:last])[len(known) :]
        complete = text != "" and (not text.endswith(_INCOMPLETE) or whole.startswith(text, start))
        if complete or last == len(ids) or last - first == _LONGEST:
            pieces.append(Piece(text, start, first, last))
            start, before, first = start + len(text), first, last
            known = text_of(ids[before:last])
    if "".join(piece.text for piece in pieces) != whole:  # a decoder that rewrites what stands before
        return [Piece(whole, 0, 0, len(ids))]
    return pieces


def text_after(before: Sequence[int], token: int, text_of: TextOf, name: str) -> str:
    """What a token would add to a text; its `name` in the vocabulary where that is nothing, or half a character."""
    context = list(before[-1:])
    text = text_of([*context, token])[len(text_of(context)) :]
    return name if text == "" or _INCOMPLETE in text else text
