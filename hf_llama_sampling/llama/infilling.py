"""Code Llama's infilling format: encode a prefix and a suffix as one prompt, and decode the ids of the text between.

The rules are those of facebookresearch/codellama, ``llama/generation.py`` (``infilling_prompt_tokens``) and
``llama/tokenizer.py``. What this module does not do: it generates nothing, batches nothing and cuts nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

_PIECES = {"prefix": "▁<PRE>", "suffix": "▁<SUF>", "middle": "▁<MID>", "end": "▁<EOT>"}
_ANCHOR = "☺"  # put before a text that continues another, so that SentencePiece adds no space at its beginning


class _Infilling(TypedDict):
    generation: str
    full_text: str


class InfillingPrediction(_Infilling, total=False):
    """Text between a prefix and a suffix, and the three together; all else where asked for, `tokens` as pieces."""

    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    logprobs_of: list[list[tuple[int, float, int]]]
    temperature_logprobs: list[float]
    sampled_logprobs: list[float]
    nucleus_mass: list[float]
    stop_reason: str | None


class InfillingIds(NamedTuple):
    """The ids that mark where the prefix, the suffix and the text between them begin, and where that text ends."""

    prefix: int
    suffix: int
    middle: int
    end: int


def find_infilling_ids(tokenizer: Any) -> tuple[int | None, ...]:
    """Look up the ids of the prefix, suffix, middle and end pieces; None for those that the vocabulary lacks."""
    return tuple(_piece_to_id(tokenizer, piece) for piece in _PIECES.values())


def infilling_ids(tokenizer: Any) -> InfillingIds:
    """Look up the marks of a Code Llama tokenizer.

    Raises:
        ValueError: the tokenizer lacks one of them.
    """
    ids = {name: _piece_to_id(tokenizer, piece) for name, piece in _PIECES.items()}
    for name, piece in _PIECES.items():
        if ids[name] is None:
            raise ValueError(
                f"infilling needs a tokenizer with Code Llama's marks, and this one has no {piece!r}: take the "
                "tokenizer of a Code Llama checkpoint that was trained to infill (7B or 13B, base or Instruct)"
            )
    return InfillingIds(**{name: id_ for name, id_ in ids.items() if id_ is not None})


def infilling_tokens(prefix: str, suffix: str, tokenizer: Any, *, suffix_first: bool = False) -> list[int]:
    """Build the prompt that asks for the text between `prefix` and `suffix`.

    With BOS ``.``, the marks ``P`` (prefix), ``S`` (suffix), ``M`` (middle), the texts ``p`` and ``s``::

        suffix_first=False     . P p p S s s M
        suffix_first=True      . P S s s M p p

    The suffix continues a text, so it is encoded without the space that SentencePiece puts before a text.

    Raises:
        ValueError: the tokenizer has no marks or no BOS, or a text cannot be encoded.
    """
    marks = infilling_ids(tokenizer)
    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = continuing_tokens(suffix, tokenizer)
    start = tokenizer.encode("", bos=True, eos=False)
    if suffix_first:
        return [*start, marks.prefix, marks.suffix, *after, marks.middle, *before]
    return [*start, marks.prefix, *before, marks.suffix, *after, marks.middle]


def continuing_tokens(text: str, tokenizer: Any) -> list[int]:
    """Encode a text that continues another: without a space before it."""
    anchor = tokenizer.encode(_ANCHOR, bos=False, eos=False)
    ids: list[int] = tokenizer.encode(_ANCHOR + text, bos=False, eos=False)
    if ids[: len(anchor)] != anchor:
        raise ValueError(
            f"infilling needs a tokenizer that keeps {_ANCHOR!r} apart from the text after it, and this one joins "
            f"them before {text[:20]!r}: take a tokenizer of Code Llama's"
        )
    return ids[len(anchor) :]


def continuing_text(ids: Sequence[int], tokenizer: Any) -> str:
    """Decode ids that continue another text, and keep leading spaces: the inverse of `continuing_tokens`."""
    anchor = tokenizer.encode(_ANCHOR, bos=False, eos=False)
    text: str = tokenizer.decode([*anchor, *ids])
    return text.partition(_ANCHOR)[2]


def token_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return each id's piece as the vocabulary spells it (``▁he``), as Code Llama's package does."""
    if hasattr(tokenizer, "sp_model"):
        return [str(tokenizer.sp_model.id_to_piece(int(token))) for token in ids]
    if hasattr(tokenizer, "tokenizer"):
        return [str(piece) for piece in tokenizer.tokenizer.convert_ids_to_tokens(list(ids))]
    return [str(tokenizer.decode([token])) for token in ids]


def _piece_to_id(tokenizer: Any, piece: str) -> int | None:
    """Look up the id of a piece; None if the vocabulary has no such piece."""
    if hasattr(tokenizer, "sp_model"):
        token = int(tokenizer.sp_model.piece_to_id(piece))
        return token if tokenizer.sp_model.id_to_piece(token) == piece else None
    if hasattr(tokenizer, "tokenizer"):
        found = tokenizer.tokenizer.get_vocab().get(piece)
        return None if found is None else int(found)
    return None
