"""`score_tokens`: choose the tokens to score, and slide a window over texts that are longer than the limit.

A window of `size` tokens moves by `stride`. Each token is scored once, in the first window that reaches it, so it has
at least `size - stride` tokens of context, if the text has as many. Size 4, stride 2, eight tokens::

    a b c d          scores b c d
        c d e f      scores e f
            e f g h  scores g h

This is the convention of transformers' documentation ("Perplexity of fixed-length models") for a stride below the size.
lm-evaluation-harness' rolling windows equal these with a size of its `max_length` plus one and a stride of
`max_length`, except the last one, which begins earlier so that it is full.
What this module does not do: it runs no model (see `walk`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_count, check_int, to_list
from .continuations import bos_id
from .model_info import check_max_seq_len, check_positions
from .outputs import LlamaScoreOutput
from .prefix import Text
from .probe import Probe
from .scoring import refuse_other_positions, refuse_without_order
from .walk import score_texts


class Window(NamedTuple):
    """A window `begin..end` of a text that scores tokens `first..end - 1`; all are positions in the text."""

    begin: int
    end: int
    first: int


def windows(length: int, size: int | None, stride: int | None, start: int = 1) -> Iterator[Window]:
    """Yield the windows that score each token of a text once, from position `start` (at least 1) on.

    >>> list(windows(8, 4, 2))
    [Window(begin=0, end=4, first=1), Window(begin=2, end=6, first=4), Window(begin=4, end=8, first=6)]
    """
    begin, first = 0, start
    while first < length:
        end = length if size is None or stride is None else min(begin + size, length)
        if end > first:
            yield Window(begin, end, first)
            first = end
        begin += stride or length


def tokens_scored(
    model: Any,
    generate: Callable[..., Any],
    rows: list[list[int]],
    *,
    top: int,
    named: list[list[int]],
    start: Any,
    max_seq_len: int | None,
    stride: Any,
    bos: int | bool | None,
    chunk_bytes: int,
    cache_bytes: int,
) -> LlamaScoreOutput:
    """Implement `LlamaGenerationMixin.score_tokens`; `rows` are lists of ids, `named` the ids to score in each."""
    starts = _check_starts(start, rows)
    size = check_max_seq_len(model, max_seq_len)
    stride = check_stride(stride, size)
    before = bos_id(model, bos)
    given = 0 if before is None else 1
    texts = rows if before is None else [[before, *row] for row in rows]
    if stride is None:
        _check_lengths(texts, size, by_call=max_seq_len is not None, bos=before is not None)
    longest = max(map(len, texts))
    check_positions(model, longest if size is None else min(longest, size), "a text")
    probe = Probe(model, generate)
    refuse_other_positions(model, probe)
    refuse_without_order(model, probe)
    firsts = [max(1, at + given) for at in starts]
    parts = [
        _cut(text, windows(len(text), size, stride, first), given, ids)
        for text, first, ids in zip(texts, firsts, named, strict=True)
    ]
    score_texts(
        model,
        generate,
        [part for row in parts for part in row],
        rows=[row for row, cut in enumerate(parts) for _ in cut],
        top=top,
        greedy=False,
        apart=not (start is None and stride is None),
        chunk_bytes=chunk_bytes,
        cache_bytes=cache_bytes,
    )
    output = _output(parts, [at + given == 0 for at in starts], top=bool(top), named=any(named))
    output.prompt_tokens = [list(row) for row in rows]
    return output


def _cut(text: list[int], found: Iterator[Window], given: int, named: list[int]) -> list[Text]:
    """Make a `Text` per window; the first `given` tokens (the BOS) are ours, not the caller's."""
    ids = np.array(text, np.int32)
    return [Text(ids[part.begin : part.end], part.first - part.begin, part.begin - given, named) for part in found]


def _output(parts: list[list[Text]], unscored: list[bool], *, top: bool, named: bool) -> LlamaScoreOutput:
    """Join the scores of each row's windows.

    Report 0.0 for a first token without context (`unscored`), as the reference does; leave it out of totals and counts.
    """
    logprobs = [[value for part in row for value in part.logprobs()] for row in parts]

    def joined(of: Callable[[Text], list[Any]]) -> list[list[Any]]:
        rows = zip(unscored, parts, strict=True)
        return [[[]] * blank + [found for part in row for found in of(part)] for blank, row in rows]

    return LlamaScoreOutput(
        logprobs=[[0.0] * blank + row for blank, row in zip(unscored, logprobs, strict=True)],
        top_logprobs=joined(Text.top) if top else None,
        logprobs_of=joined(Text.named_logprobs) if named else None,
        totals=[math.fsum(row) for row in logprobs],
        counts=[len(row) for row in logprobs],
    )


def _check_starts(start: Any, rows: list[list[int]]) -> list[int]:
    """Read `start`, the first position to score: one int for all rows, or one per row."""
    listed = [0 if start is None else start] * len(rows) if to_list(start) is None else to_list(start) or []
    check_count("start", len(listed), len(rows))
    return [
        check_int("start", at, least=0, most=len(row), where=f" for row {place}, which has {len(row)} tokens")
        for place, (at, row) in enumerate(zip(listed, rows, strict=True))
    ]


def check_stride(stride: Any, size: int | None) -> int | None:
    """Check stride < size, so that every scored token has context."""
    if stride is None:
        return None
    number = check_int("stride", stride, least=1)
    if size is None:
        raise ValueError("stride moves a window of max_seq_len tokens, and this model names no context: give both")
    if number >= size:
        raise ValueError(
            f"stride must be below the window's {size} tokens, so that each token has one before it, got {number}: "
            "lower it, or raise max_seq_len"
        )
    return number


def _check_lengths(texts: Sequence[Sequence[int]], most: int | None, *, by_call: bool, bos: bool) -> None:
    """Refuse a text that is longer than the limit, rather than cut it silently."""
    name = "max_seq_len" if by_call else "the model's context"
    for row, text in enumerate(texts):
        if most is not None and len(text) > most:
            raise ValueError(
                f"a prompt must fit {name} of {most} tokens, but row {row} has {len(text)}{' with its BOS' * bos}: "
                "shorten or split it, or slide a window over it with stride="
            )
