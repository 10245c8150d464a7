"""Text to token ids and back, behind the five members that Meta's tokenizer has.

`Tokenizer` reads a SentencePiece file, `TransformersTokenizer` wraps a transformers tokenizer, and `load_tokenizer`
finds out which of the two is meant. Neither pads, cuts, batches or applies a chat template.
"""

import operator
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, SupportsIndex, TypeGuard, runtime_checkable

from sentencepiece import SentencePieceProcessor

from .loading import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


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


class Tokenizer:
    """A SentencePiece model, with the members and the behaviour of the reference's ``Tokenizer`` (llama/tokenizer.py).

    - ``n_words``, ``bos_id``, ``eos_id``, ``pad_id``: as the model says; -1 where it has no such piece (LLAMA2: pad).
    - ``encode`` never makes a control token out of text: ``"<s>"`` in a string is three characters.
    - ``decode`` is SentencePiece's own: no leading space, byte pieces joined into characters, control tokens left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.sp_model = _read_sentencepiece(Path(model_path))
        self.n_words: int = self.sp_model.vocab_size()
        self.bos_id: int = self.sp_model.bos_id()
        self.eos_id: int = self.sp_model.eos_id()
        self.pad_id: int = self.sp_model.pad_id()

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """Token ids of ``s``, after BOS if ``bos`` and before EOS if ``eos``.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` is not valid Unicode, or BOS or EOS is asked for and the model has none.
        """
        _check_text(s)
        return _framed(self.sp_model.encode(s), self, bos=bos, eos=eos)

    def decode(self, ids: SupportsIndex | Iterable[SupportsIndex]) -> str:
        """The text of token ids, or of a single one.

        Raises:
            TypeError: ``ids`` is neither an id nor a flat list of ids.
            ValueError: an id is outside the vocabulary.
        """
        text: str = self.sp_model.decode(_checked_ids(ids, self.n_words))
        return text


class TransformersTokenizer:
    """A transformers tokenizer behind Meta's five members; ``tokenizer`` is the wrapped one.

    - ``n_words`` is ``len(tokenizer)``; ``bos_id``, ``eos_id``, ``pad_id`` are its ids, or -1 where it has none.
    - ``encode`` asks it for the bare text and then adds exactly the BOS and EOS asked for, whatever it adds by itself.
      Special tokens spelled out in the text count as such, unless it was made with ``split_special_tokens=True``.
    - ``decode`` leaves special tokens out and keeps the spaces as they are.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self.n_words = len(tokenizer)
        self.bos_id = _id_or_none(tokenizer.bos_token_id)
        self.eos_id = _id_or_none(tokenizer.eos_token_id)
        self.pad_id = _id_or_none(tokenizer.pad_token_id)

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """As `Tokenizer.encode`."""
        _check_text(s)
        return _framed(self.tokenizer.encode(s, add_special_tokens=False), self, bos=bos, eos=eos)

    def decode(self, ids: SupportsIndex | Iterable[SupportsIndex]) -> str:
        """As `Tokenizer.decode`."""
        checked = _checked_ids(ids, self.n_words)
        text = self.tokenizer.decode(checked, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer came with a chat format of its own."""
        return self.tokenizer.chat_template is not None

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation in the tokenizer's own chat format, open for the assistant's answer."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(token) for token in ids]


def load_tokenizer(source: "str | Path | TokenizerLike | PreTrainedTokenizerBase") -> TokenizerLike:
    """The tokenizer that a path, a Hub id or an object stands for.

    Args:
        source: a SentencePiece file, of any name; a GGUF file; a folder with a transformers tokenizer, or else with
            ``tokenizer.model``; a Hub id; a transformers tokenizer; an object with Meta's five members, returned as is.

    Raises:
        FileNotFoundError: there is no such file, folder or repository, or no tokenizer in it.
        TypeError: an object of another kind.
        ValueError: the file is not a tokenizer.
    """
    if isinstance(source, TokenizerLike):
        return source
    if _is_transformers_tokenizer(source):
        return TransformersTokenizer(source)
    if not isinstance(source, str | Path):
        raise TypeError(
            "a tokenizer is a path, a Hub id, a transformers tokenizer or an object with n_words, bos_id, eos_id, "
            f"pad_id, encode and decode, and this is of type {type(source).__name__}: give one of these"
        )
    path = Path(source)
    if path.is_dir():
        return _load_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_pretrained(str(path.parent), gguf_file=path.name)
    if path.name in _TRANSFORMERS_FILES and path.is_file():
        return _load_folder(path.parent)
    if isinstance(source, str) and not path.exists() and is_hub_id(source):
        return _from_pretrained(source)
    return Tokenizer(path)


def _load_folder(folder: Path) -> TokenizerLike:
    if any((folder / name).is_file() for name in _TRANSFORMERS_FILES):
        return _from_pretrained(str(folder))
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder / "tokenizer.model")
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1:
        return _from_pretrained(str(folder), gguf_file=packed[0].name)
    raise FileNotFoundError(
        f"a tokenizer's folder holds tokenizer.json, tokenizer_config.json, tokenizer.model or one GGUF file, and "
        f"{str(folder)!r} holds none of them: give the folder or the file that does"
    )


def _from_pretrained(name: str, **options: str) -> TransformersTokenizer:
    from transformers import AutoTokenizer  # seconds to import, and a SentencePiece file does without

    try:
        return TransformersTokenizer(from_pretrained(AutoTokenizer, name, **options))
    except OSError as error:
        raise FileNotFoundError(
            f"a tokenizer is a file, a folder or a Hub id, and transformers finds no tokenizer under {name!r}: check "
            "the name, or give the path of a SentencePiece file"
        ) from error


def _is_transformers_tokenizer(source: object) -> "TypeGuard[PreTrainedTokenizerBase]":
    # Whoever holds such an object has imported transformers; nobody else should wait for the import.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(source, transformers.PreTrainedTokenizerBase)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no path can be a repository's: a mistyped path must not be asked of the Hub."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not name.endswith((".model", ".json", ".gguf"))


def _read_sentencepiece(path: Path) -> SentencePieceProcessor:
    if not path.exists():
        raise FileNotFoundError(
            f"a tokenizer is a SentencePiece file, and there is none at {str(path)!r}: check the path"
        )
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        kind = "folder" if path.is_dir() else "file"
        raise ValueError(
            f"a tokenizer is a SentencePiece file, and the {kind} {str(path)!r} is not one: give the tokenizer.model "
            "that came with the checkpoint, or a transformers tokenizer"
        ) from error


def _id_or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


def _check_text(s: object) -> None:
    if not isinstance(s, str):
        raise TypeError(f"encode takes a string, and this is of type {type(s).__name__}: encode one text at a time")
    try:
        s.encode()
    except UnicodeEncodeError as error:  # a lone surrogate, as in command line arguments that were not UTF-8
        raise ValueError(
            f"encode takes valid Unicode, and the character at place {error.start} is the lone surrogate "
            f"{s[error.start]!r}: remove or replace it"
        ) from error


def _framed(ids: list[int], tokenizer: TokenizerLike, *, bos: bool, eos: bool) -> list[int]:
    for asked, token_id, name in ((bos, tokenizer.bos_id, "bos"), (eos, tokenizer.eos_id, "eos")):
        if asked and token_id < 0:
            raise ValueError(
                f"{name}=True asks for a {name.upper()} token, and this tokenizer has none: choose one "
                f"(tokenizer.{name}_token = ... on a transformers tokenizer) or encode with {name}=False"
            )
    return [tokenizer.bos_id] * bos + ids + [tokenizer.eos_id] * eos


def _checked_ids(ids: SupportsIndex | Iterable[SupportsIndex], n_words: int) -> list[int]:
    checked = _as_list(ids)
    for place, token_id in enumerate(checked):
        if not 0 <= token_id < n_words:
            raise ValueError(
                f"a token id is from 0 to {n_words - 1}, as the vocabulary has {n_words}, and the id at place {place} "
                f"is {token_id}: cut or drop it before decoding"
            )
    return checked


def _as_list(ids: SupportsIndex | Iterable[SupportsIndex]) -> list[int]:
    with suppress(TypeError):  # asked of the value, not of its type: a tensor of no dimension claims to be iterable
        return [operator.index(ids)]  # type: ignore[arg-type]
    try:
        return [operator.index(i) for i in ids]  # type: ignore[union-attr]
    except TypeError as error:
        raise TypeError(
            f"decode takes a token id or a flat list of token ids, and this is a {type(ids).__name__} of something "
            "else: decode one sequence at a time"
        ) from error
