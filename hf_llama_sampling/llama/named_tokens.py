"""Read the tokens whose logprobs are asked for: ids, or texts that are one token within a text.

What this module does not do: it computes no logprob.
"""

from collections.abc import Sequence
from typing import Any

from ..checks import check_count, to_list
from .tokenizer import TokenizerLike

LogprobsOf = Sequence[int | str] | Sequence[Sequence[int | str]]


def named_ids(given: LogprobsOf | None, rows: int, tokenizer: TokenizerLike) -> list[list[Any]] | None:
    """List the ids that each row asks for; `generate` checks that they are in the vocabulary.

    Args:
        given: ids and texts for all rows, or one such list per row.
        rows: B.
        tokenizer: makes a token of each text.

    Raises:
        ValueError: no token at all, a text that is not one token, or lists for another number of rows.
        TypeError: neither of the two kinds of list.

    >>> named_ids([5, " king"], 2, tokenizer)
    [[5, 542], [5, 542]]
    """
    if given is None:
        return None
    listed = to_list(given)
    if listed is None:
        raise TypeError(
            f"logprobs_of must be a list of token ids or texts of one token, or one such list per row, got {given!r}"
        )
    if not listed:
        raise ValueError("logprobs_of must name at least one token, got none: leave it out")
    if all(to_list(token) is None for token in listed):
        return [[token_id(token, tokenizer) for token in listed]] * rows
    check_count("logprobs_of", len(listed), rows)
    return [
        [token_id(token, tokenizer, f" for row {row}") for token in to_list(tokens) or []]
        for row, tokens in enumerate(listed)
    ]


def token_id(token: Any, tokenizer: TokenizerLike, where: str = "") -> Any:
    """Return the id of a text that is one token within a text (" Yes" differs from "Yes"); return an id unchanged."""
    if not isinstance(token, str):
        return token
    ids = _within_a_text(token, tokenizer)
    if len(ids) != 1:
        spaced = f" {token}"
        is_one = token and len(_within_a_text(spaced, tokenizer)) == 1
        raise ValueError(
            f"logprobs_of takes texts of one token, and {token!r} makes {len(ids)}{where}: "
            + (f"give {spaced!r}, which is one" if is_one else "give an id, or another text")
        )
    return ids[0]


def _within_a_text(text: str, tokenizer: TokenizerLike) -> list[int]:
    """Encode a text as it is after a line end, since tokenizers put a space before a text that is encoded alone."""
    before = tokenizer.encode("\n", bos=False, eos=False)
    ids = tokenizer.encode(f"\n{text}", bos=False, eos=False)
    # If the line end and the text merge into other tokens, encode the text alone.
    return ids[len(before) :] if ids[: len(before)] == before else tokenizer.encode(text, bos=False, eos=False)
