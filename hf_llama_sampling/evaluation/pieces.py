"""Split a text into the pieces that its tokens spell: they add up to the text, and none is half a character.

What this module does not do: it decodes nothing itself; it is given a function that does.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..text.stopping import TextOf
from ..text.tokens import INCOMPLETE, byte_level

_LONGEST = 32  # most tokens of a piece; a family emoji has 18 bytes


class Piece(NamedTuple):
    """Characters of a text, and the tokens that spell them: one, or several that only together make characters."""

    text: str
    start: int  # characters before it
    first: int  # its tokens are first, ..., last - 1
    last: int


def pieces_of(ids: Sequence[int], text_of: TextOf) -> list[Piece]:
    r"""Split a text into pieces: their texts joined are `text_of(ids)`, and their tokens joined are `ids`.

    Each token is decoded after the previous piece, since decoders drop a text's leading space.

    >>> pieces_of([367, 542], llama.text_of)
    [Piece(text='The', start=0, first=0, last=1), Piece(text=' king', start=3, first=1, last=2)]
    """
    whole = text_of(ids)
    pieces: list[Piece] = []
    start = before = first = 0  # characters so far, first token of the piece before, first of this one
    known = ""  # the text of the piece before, decoded alone
    for last in range(1, len(ids) + 1):
        text = text_of(ids[before:last])[len(known) :]
        complete = text != "" and (not text.endswith(INCOMPLETE) or whole.startswith(text, start))
        if complete or last == len(ids) or last - first == _LONGEST:
            pieces.append(Piece(text, start, first, last))
            start, before, first = start + len(text), first, last
            known = text_of(ids[before:last])
    if "".join(piece.text for piece in pieces) != whole:  # the decoder rewrites earlier text
        return [Piece(whole, 0, 0, len(ids))]
    return pieces


def text_after(before: Sequence[int], token: int, text_of: TextOf, name: str) -> str:
    """Return the text that a token would add; if that is no whole character, its `name` or bytes in the vocabulary."""
    context = list(before[-1:])
    text = text_of([*context, token])[len(text_of(context)) :]
    return _spell_bytes(name) if text == "" or INCOMPLETE in text else text


def _spell_bytes(name: str) -> str:
    """Spell the bytes of a byte-level vocabulary's name as SentencePiece does; return any other name unchanged.

    >>> _spell_bytes("\u0120\u00e4\u00bd"), _spell_bytes("<0xE4>"), _spell_bytes("</s>")
    (' <0xE4><0xBD>', '<0xE4>', '</s>')
    """
    known = byte_level()
    if name.isascii() or not all(character in known for character in name):
        return name
    found = [known[character] for character in name]
    return "".join(chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in found)
