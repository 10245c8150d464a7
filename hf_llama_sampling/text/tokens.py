r"""Spell each token of a text in bytes and in characters, so that the tokens' texts add up to the text.

A token's offset is the number of characters that are complete before it. So the text of token i is
``text[offsets[i]:offsets[i + 1]]``, these pieces add up to the text, and a character that several tokens spell byte by
byte belongs to the last of them::

    tokens      a   0xE4   0xBD   0xA0   b
    offsets     0   1      1      1      2
    texts       a                 你     b

What this module does not do: it encodes nothing, and knows no model.
"""

import codecs
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

INCOMPLETE = "\ufffd"  # decoded from bytes that make no character, or none yet
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TokenTexts(NamedTuple):
    """The text of some tokens, with each token's offset and bytes."""

    text: str
    offsets: list[int]  # characters that are complete before each token
    bytes: list[bytes]  # each token's bytes; empty for control tokens

    @property
    def pieces(self) -> list[str]:
        """Split the text by token; the pieces add up to it, so the last one ends where the text was cut."""
        ends = [*self.offsets[1:], len(self.text)]
        return [self.text[start:end] for start, end in zip(self.offsets, ends, strict=False)]

    def cut(self, count: int, length: int) -> "TokenTexts":
        """Keep the first `count` tokens and the first `length` characters."""
        return TokenTexts(self.text[:length], self.offsets[:count], self.bytes[:count])

    def after(self, count: int) -> "TokenTexts":
        """Drop the first `count` tokens and their text."""
        if count == 0:
            return self
        start = self.offsets[count] if count < len(self.offsets) else len(self.text)
        return TokenTexts(self.text[start:], [at - start for at in self.offsets[count:]], self.bytes[count:])


class TokenSpeller:
    """Spells the tokens of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer, or anything with the five members of Meta's.

    >>> TokenSpeller(Tokenizer(path)).texts([1, 367, 542])
    TokenTexts(text='The king', offsets=[0, 0, 3], bytes=[b'', b' The', b' king'])
    """

    def __init__(self, tokenizer: Any) -> None:
        wrapped: Any = getattr(tokenizer, "tokenizer", None)
        self.tokenizer: Any = wrapped if hasattr(wrapped, "convert_ids_to_tokens") else tokenizer
        self.of_transformers = hasattr(self.tokenizer, "convert_ids_to_tokens")
        if not (self.of_transformers or (hasattr(tokenizer, "n_words") and hasattr(tokenizer, "decode"))):
            raise TypeError(
                "tokenizer must be one of transformers, or have the five members of Meta's, got "
                f"{type(tokenizer).__name__}: pass the model's tokenizer"
            )
        self.size = len(self.tokenizer) if self.of_transformers else int(self.tokenizer.n_words)
        self._known: dict[int, bytes] = {}
        self._anchor: tuple[list[int], str] | None = None

    def text_of(self, ids: Sequence[int]) -> str:
        """Decode tokens without control tokens. Ignore ids beyond the tokenizer's vocabulary."""
        known = [token for token in ids if token < self.size]
        if self.of_transformers:
            text = self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        else:
            text = self.tokenizer.decode(known)
        return str(text)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token spells inside a text."""
        if token not in self._known:
            self._known[token] = self._spell(token) if token < self.size else b""
        return self._known[token]

    @functools.cached_property
    def is_byte(self) -> Callable[[int], bool] | None:
        """Return a test for byte tokens, for decoders that turn a whole invalid byte run into U+FFFD; else None.

        Decoders of the `tokenizers` library do so: a wrong byte then changes the text of the valid ones before it.
        """
        if not self.of_transformers:
            return None
        run = [self.tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xe4"]
        if None in run or len(set(run)) < 3 or self.text_of(run).startswith("\u00e9"):
            return None
        return lambda token: token < self.size and _BYTE.fullmatch(self._piece(token)) is not None

    @functools.cached_property
    def control_tokens(self) -> dict[str, int]:
        """Ids of the tokens that decoded text leaves out, by their spellings."""
        if self.of_transformers:
            added = {token.content: id_ for id_, token in self.tokenizer.added_tokens_decoder.items()}
            special = {
                token: self.tokenizer.convert_tokens_to_ids(token) for token in self.tokenizer.all_special_tokens
            }
            return {token: id_ for token, id_ in (added | special).items() if token and not self.text_of([id_])}
        if not hasattr(self.tokenizer, "sp_model"):
            return {}
        is_control = self.tokenizer.sp_model.is_control
        return {self._piece(token): token for token in range(self.size) if is_control(token)}

    def name_of(self, token: int) -> str:
        r"""A token's own text; for bytes that make no characters alone, OpenAI's ``bytes:\xe4\xbd``."""
        spelled = self.bytes_of(token)
        try:
            return spelled.decode() if spelled else self._piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def texts(self, ids: Sequence[int], *, given: int = 0) -> TokenTexts:
        """Return the texts of tokens. Drop the first `given` tokens, used only as context."""
        spelled = [self.bytes_of(token) for token in ids]
        whole = self.text_of(ids)
        made = _joined(spelled)
        if made.text != whole and made.text == f" {whole}":  # decoders drop the space that a text begins with
            first = next(place for place, piece in enumerate(spelled) if piece)
            made = _joined([*spelled[:first], spelled[first][1:], *spelled[first + 1 :]])
        if made.text != whole:
            made = self._by_prefixes(ids, whole)
        return TokenTexts(whole, made.offsets, spelled).after(given)

    def text_after(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """Return a decoder of tokens after a prompt: prompt text plus its result equal the text decoded as one."""
        # Decode from the prompt's last token that begins a character: only that context can change what follows.
        places = reversed(range(len(prompt)))
        start = next((place for place in places if _begins_a_character(self.bytes_of(prompt[place]))), 0)
        context = list(prompt[start:])
        known = len(self.text_of(context).rstrip(INCOMPLETE))
        return lambda ids: self.text_of([*context, *ids])[known:]

    def _by_prefixes(self, ids: Sequence[int], whole: str) -> TokenTexts:
        """Compute offsets by decoding every prefix, for decoders that do more than join the tokens' bytes."""
        offsets, so_far = [], 0
        for count in range(len(ids)):
            text = self.text_of(ids[:count]).rstrip(INCOMPLETE)
            if whole.startswith(text):
                so_far = max(so_far, len(text))
            offsets.append(so_far)
        return TokenTexts(whole, offsets, [])

    def _spell(self, token: int) -> bytes:
        piece = self._piece(token)
        if _BYTE.fullmatch(piece) and self._decoded(token) != piece:
            return bytes([int(piece[3:5], 16)])
        text = self._decoded(token)
        if INCOMPLETE not in text:
            return text.encode()
        known = byte_level()
        if all(character in known for character in piece):
            return bytes(known[character] for character in piece)
        return text.encode()

    def _decoded(self, token: int) -> str:
        """Decode after an anchor token, so that a leading space is kept."""
        if self._anchor is None:
            options = {"add_special_tokens": False} if self.of_transformers else {"bos": False, "eos": False}
            ids = list(self.tokenizer.encode("a", **options))
            self._anchor = ids, self.text_of(ids)
        ids, text = self._anchor
        return self.text_of([*ids, token])[len(text) :]

    def _piece(self, token: int) -> str:
        """Return a token as the vocabulary writes it; ``<id>`` if the tokenizer cannot tell, or does not have it."""
        if token >= self.size:
            return f"<{token}>"
        if self.of_transformers:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        if hasattr(self.tokenizer, "sp_model"):
            return str(self.tokenizer.sp_model.id_to_piece(token))
        return f"<{token}>"


def _joined(spelled: Sequence[bytes]) -> TokenTexts:
    """Decode pieces of bytes as one UTF-8 text, with the number of characters complete before each piece."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, parts, so_far = [], [], 0
    for piece in spelled:
        offsets.append(so_far)
        parts.append(decoder.decode(piece))
        so_far += len(parts[-1])
    return TokenTexts("".join([*parts, decoder.decode(b"", True)]), offsets, list(spelled))


def _begins_a_character(spelled: bytes) -> bool:
    """Whether the bytes are non-empty and begin a new UTF-8 character."""
    return bool(spelled) and spelled[0] & 0xC0 != 0x80


@functools.cache
def byte_level() -> dict[str, int]:
    """Map the characters of byte-level vocabularies to their bytes (openai/gpt-2, ``encoder.py``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
