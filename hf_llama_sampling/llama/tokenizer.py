"""Text to token ids and back, behind the five members that Meta's tokenizer has.

`Tokenizer` reads a SentencePiece file, and `TransformersTokenizer` wraps a transformers tokenizer. With both, text
never becomes a control token: only `bos=True`, `eos=True` and a chat template write those. What this module does not
do: it finds no files (`loading` does), pads nothing and cuts nothing.
"""

import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, SupportsIndex, overload, runtime_checkable

from sentencepiece import SentencePieceProcessor

from ..checks import ReferenceFileNotFoundError, ReferenceTypeError, check_bool, check_int, is_lfs_pointer
from .control_tokens import ControlTokens, warn_of_template_text
from .dialog import Message, dialog_turns
from .infilling import continuing_text, continuing_tokens, find_infilling_ids, token_pieces
from .templates import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")  # a line: a token in base64, and its rank
_PROBE: list[Message] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
]


@runtime_checkable
class TokenizerLike(Protocol):
    """Meta's five members (``bos_id``, ``eos_id`` and ``pad_id`` make one): all that this package asks of a tokenizer.

    An id of -1 means that the tokenizer has no such token.
    """

    n_words: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def id_before(tokenizer: TokenizerLike, bos: int | bool) -> int | None:
    """Read which id to put before a text that is scored: an id, True for the tokenizer's BOS, False for none.

    Raises:
        ValueError: `True`, and the tokenizer has no BOS.
    """
    if bos is True and tokenizer.bos_id < 0:
        raise ValueError("bos asks for the tokenizer's BOS, and this one has none: name an id, or none")
    if bos is True:
        return tokenizer.bos_id
    return None if bos is False else check_int("bos", bos, least=0)


class Tokenizer:
    """A SentencePiece model, with the members and the behaviour of the reference's ``Tokenizer`` (llama/tokenizer.py).

    - ``n_words``, ``bos_id``, ``eos_id``, ``pad_id``: as the model says; -1 where it has no such piece (LLAMA2: pad).
    - ``encode`` never makes a control token out of text: ``"<s>"`` in a string is three characters.
    - ``decode`` is SentencePiece's own: no leading space, byte pieces joined into characters, control tokens left out.

    Args:
        model_path: a SentencePiece file, of any name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model.

    >>> tokenizer = Tokenizer("hf_llama_sampling/tiny_llama/tokenizer.model")
    >>> tokenizer.encode("The king", bos=True, eos=False)
    [1, 367, 542]
    >>> tokenizer.decode([1, 367, 542])
    'The king'
    """

    def __init__(self, model_path: str | Path) -> None:
        if not isinstance(model_path, (str, os.PathLike)):
            raise TypeError(
                f"a tokenizer is a SentencePiece file, and this is of type {type(model_path).__name__}: give its path"
            )
        self.sp_model = _read_sentencepiece(Path(model_path))
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()
        # Code Llama's pieces for infilling, or None.
        self.prefix_id, self.suffix_id, self.middle_id, self.eot_id = find_infilling_ids(self)

    @property
    def n_added(self) -> int:
        """How many of the last ids are control tokens: a model may lack them."""
        added = 0
        while added < self.n_words and self.sp_model.is_control(self.n_words - 1 - added):
            added += 1
        return added

    @overload
    def encode(self, s: str | bytes, bos: bool, eos: bool) -> list[int]: ...  # type: ignore[overload-overlap]
    @overload
    def encode(self, s: Iterable[str] | Iterable[bytes], bos: bool, eos: bool) -> list[list[int]]: ...
    def encode(self, s: Any, bos: bool, eos: bool) -> Any:
        """Token ids of a text, after BOS if ``bos`` and before EOS if ``eos``; of several texts, one list each.

        Raises:
            TypeError: ``s`` is no text and no list of texts, or ``bos`` or ``eos`` is no bool.
            ValueError: ``s`` is not valid Unicode, or BOS or EOS is asked for and the model has none.

        >>> tokenizer.encode(["The king", "Rome"], bos=False, eos=True)
        [[367, 542, 2], [742, 2]]
        """
        if not isinstance(s, str | bytes):
            return [self.encode(text, bos, eos) for text in _check_texts(s)]
        return _frame(self.sp_model.encode(_check_text(s)), self, bos=bos, eos=eos)

    @overload
    def decode(self, ids: "SupportsIndex | Iterable[SupportsIndex] | Iterable[str]") -> str: ...
    @overload
    def decode(self, ids: "Iterable[Iterable[SupportsIndex]]") -> list[str]: ...
    def decode(self, ids: Any) -> Any:
        """The text of token ids, of a single one, or of pieces; of several lists of ids, one text each.

        Raises:
            TypeError: ``ids`` is neither.
            ValueError: an id is outside the vocabulary.

        >>> tokenizer.decode([[367, 542], [742]])
        ['The king', 'Rome']
        """
        items = [ids] if isinstance(ids, str) else _as_list(ids)
        if items and all(isinstance(item, str) for item in items):
            return self.sp_model.decode_pieces(_check_pieces(items, self.sp_model))
        if _is_nested(items):
            return [self.decode(row) for row in items]
        return self.sp_model.decode(_check_ids(items, self.n_words))

    def token_piece(self, t: int) -> str:
        """The piece of an id as the vocabulary spells it (``▁he``); of Code Llama's tokenizer."""
        return token_pieces([t], self)[0]

    def encode_infilling(self, s: str) -> list[int]:
        """The ids of a text that continues another, without a space before it; of Code Llama's tokenizer."""
        return continuing_tokens(s, self)

    def decode_infilling(self, t: list[int]) -> str:
        """The text of ids that continue another text; of Code Llama's tokenizer."""
        return continuing_text(t, self)


class TransformersTokenizer:
    """A transformers tokenizer behind Meta's five members; ``tokenizer`` is the wrapped one.

    - ``n_words`` is ``len(tokenizer)``; ``bos_id``, ``eos_id``, ``pad_id`` are its ids, or -1 where it has none.
    - ``encode`` asks it for the bare text and then adds exactly the BOS and EOS asked for, whatever it adds by itself.
      Control tokens spelled out in the text are characters, as with `Tokenizer`; text that begins with one looks made
      by a chat template, and brings a warning.
    - ``decode`` leaves special tokens out and keeps the spaces as they are.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.n_words = len(tokenizer)
        self.bos_id = _id_or_none(tokenizer.bos_token_id)
        self.eos_id = _id_or_none(tokenizer.eos_token_id)
        self.pad_id = _id_or_none(tokenizer.pad_token_id)
        self._control = ControlTokens(tokenizer)

    @property
    def n_added(self) -> int:
        """How many of the last ids were added to the vocabulary: a model may lack them."""
        added, listed = 0, self.tokenizer.added_tokens_decoder
        while self.n_words - 1 - added in listed:
            added += 1
        return added

    @overload
    def encode(self, s: str | bytes, bos: bool, eos: bool) -> list[int]: ...  # type: ignore[overload-overlap]
    @overload
    def encode(self, s: Iterable[str] | Iterable[bytes], bos: bool, eos: bool) -> list[list[int]]: ...
    def encode(self, s: Any, bos: bool, eos: bool) -> Any:
        """As `Tokenizer.encode`."""
        if not isinstance(s, str | bytes):
            return [self.encode(text, bos, eos) for text in _check_texts(s)]
        text = _check_text(s)
        warn_of_template_text(text, self._control)
        return _frame(self._control.encode_text(text), self, bos=bos, eos=eos)

    @overload
    def decode(self, ids: "SupportsIndex | Iterable[SupportsIndex]") -> str: ...
    @overload
    def decode(self, ids: "Iterable[Iterable[SupportsIndex]]") -> list[str]: ...
    def decode(self, ids: Any) -> Any:
        """As `Tokenizer.decode`, pieces apart."""
        items = _as_list(ids)
        if _is_nested(items):
            return [self.decode(row) for row in items]
        checked = _check_ids(items, self.n_words)
        return self.tokenizer.decode(checked, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer came with a chat format of its own."""
        return self.tokenizer.chat_template is not None

    @property
    def has_llama2_template(self) -> bool:
        """Whether the tokenizer's own chat format is LLAMA2's, up to white space."""
        try:
            rendered = render_chat(self.tokenizer, [dict(message) for message in _PROBE])
        except ValueError:  # LLAMA2's takes every dialog of this kind
            return False
        bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
        expected = "".join(f"{bos}{turn.text}{eos if turn.finished else ''}" for turn in dialog_turns(_PROBE))
        return "".join(rendered.split()) == "".join(expected.split())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's own chat format, open for the assistant's answer.

        Control tokens spelled out in a message are characters; only the template itself writes control tokens.

        Raises:
            ValueError: the template refuses the messages, or fails.
        """
        rendered = render_chat(self.tokenizer, self._control.break_in(messages))
        return self._control.encode_rendered(rendered)


def _read_sentencepiece(path: Path) -> SentencePieceProcessor:
    if not path.exists():
        raise ReferenceFileNotFoundError(
            f"a tokenizer is a SentencePiece file, and there is none at {str(path)!r}: check the path"
        )
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        kind = "folder" if path.is_dir() else "file"
        way_out = "give the tokenizer.model that came with the checkpoint, or a transformers tokenizer"
        if is_lfs_pointer(path):
            way_out = "it is a pointer of git lfs, so fetch the file itself (git lfs pull)"
        elif kind == "file" and _TIKTOKEN.match(path.read_bytes()[:1024]):
            way_out = "it is in tiktoken's format, as Llama 3's are, so give the transformers tokenizer of that model"
        raise ValueError(
            f"a tokenizer is a SentencePiece file, and the {kind} {str(path)!r} is not one: {way_out}"
        ) from error


def _id_or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


def _check_texts(texts: Any) -> list[Any]:
    """Several texts as a list."""
    texts = texts.tolist() if hasattr(texts, "tolist") else texts
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable) or isinstance(texts, str | bytes):
        raise ReferenceTypeError(
            f"encode takes a text or a list of texts, and this is of type {type(texts).__name__}: give its text"
        )
    listed = list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str | bytes):
            raise ReferenceTypeError(
                f"encode takes a text or a list of texts, and the item at place {place} is of type "
                f"{type(text).__name__}: give its text"
            )
    return listed


def _check_text(s: str | bytes) -> str:
    """A text that has an encoding."""
    if isinstance(s, bytes):
        try:
            return s.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"encode takes valid UTF-8, and the byte at place {error.start} is not: decode the text yourself"
            ) from error
    try:
        s.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as in command line arguments that were not UTF-8
        raise ValueError(
            f"encode takes valid Unicode, and the character at place {error.start} is the lone surrogate "
            f"{s[error.start]!r}: remove or replace it"
        ) from error
    return str(s)


def _frame(ids: list[int], tokenizer: TokenizerLike, *, bos: bool, eos: bool) -> list[int]:
    """The ids after BOS and before EOS, where asked for."""
    for asked, token_id, name in ((bos, tokenizer.bos_id, "bos"), (eos, tokenizer.eos_id, "eos")):
        if check_bool(name, asked) and token_id < 0:
            raise ValueError(
                f"{name}=True asks for a {name.upper()} token, and this tokenizer has none: choose one "
                f"(tokenizer.{name}_token = ... on a transformers tokenizer) or encode with {name}=False"
            )
    return [tokenizer.bos_id] * bool(bos) + ids + [tokenizer.eos_id] * bool(eos)


def _as_list(ids: Any) -> list[Any]:
    """One id or several as a list."""
    if hasattr(ids, "tolist"):  # arrays, tensors, columns of a table
        ids = ids.tolist()
    if isinstance(ids, SupportsIndex):
        return [ids]
    if isinstance(ids, Mapping | str | bytes) or not isinstance(ids, Iterable):
        _refuse_ids(ids)
    return [item.tolist() if hasattr(item, "tolist") else item for item in ids]


def _is_nested(items: list[Any]) -> bool:
    """Whether these are lists of ids, and not ids."""
    return bool(items) and all(
        isinstance(item, Iterable) and not isinstance(item, str | bytes | SupportsIndex) for item in items
    )


def _check_ids(items: list[Any], n_words: int) -> list[int]:
    """Ids of the vocabulary as ints."""
    try:
        checked = [operator.index(item) for item in items]
        if any(isinstance(item, bool) for item in items):
            raise TypeError
    except TypeError:
        _refuse_ids(items)
    for place, token_id in enumerate(checked):
        if not 0 <= token_id < n_words:
            raise ValueError(
                f"a token id is from 0 to {n_words - 1}, as the vocabulary has {n_words}, and the id at place {place} "
                f"is {token_id}: cut or drop it before decoding"
            )
    return checked


def _check_pieces(pieces: list[str], sp_model: SentencePieceProcessor) -> list[str]:
    """Pieces that the vocabulary has: a text is none, and SentencePiece would give it back as it is."""
    for piece in pieces:
        if sp_model.piece_to_id(piece) == sp_model.unk_id() and piece != sp_model.id_to_piece(sp_model.unk_id()):
            raise ValueError(
                f"a piece is one of the vocabulary, and {piece!r} is none: give token ids, as encode gives them"
            )
    return pieces


def _refuse_ids(ids: object) -> NoReturn:
    raise TypeError(
        f"decode takes a token id, a flat list of token ids or several such lists, and this is a {type(ids).__name__} "
        "of something else: give token ids"
    ) from None
