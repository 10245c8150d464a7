"""`score_continuations`: score given continuations of given contexts.

What this module does not do: it generates nothing, and sees no text.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.utils import ModelOutput

from ..checks import check_int, first_not_none, to_list
from .model_info import check_positions, context_of, scored_size_of, vocab_size_of
from .prefix import Text
from .walk import score_texts


@dataclass
class LlamaContinuationOutput(ModelOutput):
    """What `score_continuations` returns: entry `[i][j]` is about continuation j of context i.

    Args:
        totals (`list[list[float]]`): the continuation's logprob given its context, natural logarithm: the sum of its
            tokens' logprobs.
        logprobs (`list[list[list[float]]]`): each of its tokens' raw logprob.
        is_greedy (`list[list[bool]]`): whether each of its tokens is the most probable one there, so that greedy
            decoding of the context would give this continuation.
    """

    totals: list[list[float]] | None = None
    logprobs: list[list[list[float]]] | None = None
    is_greedy: list[list[bool]] | None = None


def continuations_scored(
    model: Any,
    generate: Callable[..., Any],
    contexts: Any,
    continuations: Any,
    *,
    bos: int | bool | None,
    chunk_bytes: int,
    cache_bytes: int,
) -> LlamaContinuationOutput:
    """Implement `LlamaGenerationMixin.score_continuations`."""
    chunk_bytes = check_int("chunk_bytes", chunk_bytes, least=1)
    cache_bytes = check_int("cache_bytes", cache_bytes, least=0)
    starts = read_contexts(contexts, bos_id(model, bos), vocab_size_of(model))
    listed = read_continuations(continuations, len(starts), scored_size_of(model))
    _check_fit(starts, listed, context_of(model))
    longest = max(len(start) + len(ids) - 1 for start, rows in zip(starts, listed, strict=True) for ids in rows)
    check_positions(model, longest, "a context and its continuation")
    texts = [
        [Text(np.array([*start, *ids], np.int32), len(start)) for ids in rows]
        for start, rows in zip(starts, listed, strict=True)
    ]
    flat = [text for row in texts for text in row]
    rows = [row for row, listed_here in enumerate(texts) for _ in listed_here]
    score_texts(model, generate, flat, rows=rows, top=0, greedy=True, chunk_bytes=chunk_bytes, cache_bytes=cache_bytes)
    logprobs = [[text.logprobs() for text in row] for row in texts]
    return LlamaContinuationOutput(
        totals=[[math.fsum(values) for values in row] for row in logprobs],
        logprobs=logprobs,
        is_greedy=[[text.is_greedy() for text in row] for row in texts],
    )


def bos_id(model: Any, bos: int | bool | None) -> int | None:
    """Read `bos`, the id that replaces an empty context: an id, or True for the checkpoint's own."""
    if bos is None or bos is False:
        return None
    if bos is not True:
        return check_int("bos", bos, least=0, most=vocab_size_of(model) - 1)
    own = first_not_none(
        getattr(model.generation_config, "bos_token_id", None),
        getattr(model.config.get_text_config(), "bos_token_id", None),
    )
    if own is None:
        raise ValueError("bos=True means the checkpoint's BOS, but this one names none: pass the id itself")
    return check_int("bos_token_id", own, least=0, most=vocab_size_of(model) - 1)


def read_contexts(contexts: Any, bos: int | None, vocab_size: int) -> list[list[int]]:
    """Contexts as lists of ids; an empty one as the BOS, if there is one.

    Raises:
        ValueError: no context, an empty one without `bos`, or an id outside the vocabulary.
        TypeError: text, or something that holds no token ids.

    >>> read_contexts([[1, 5], []], 1, 32)
    [[1, 5], [1]]
    """
    rows = _listed(contexts, "contexts must be lists of token ids, one per context")
    if not rows:
        raise ValueError("contexts must hold at least one context, got none")
    if not _is_nested(rows):
        raise TypeError("contexts must be lists of token ids, got a list of ids: wrap a single context as [context]")
    read = []
    for row, given in enumerate(rows):
        ids = _ids(given, f"context {row}", vocab_size)
        if not ids:
            if bos is None:
                raise ValueError(
                    f"a context must hold at least one token, but context {row} is empty: pass bos= (an id, or True "
                    "for the checkpoint's) to start it after BOS"
                )
            ids = [bos]
        read.append(ids)
    return read


def read_continuations(continuations: Any, contexts: int, vocab_size: int) -> list[list[list[int]]]:
    """For each context a list of continuations, each a list of ids.

    Raises:
        ValueError: another number of lists than contexts, an empty continuation, or an id outside the vocabulary.
        TypeError: text, or something that holds no token ids.

    >>> read_continuations([[[5], [6, 7]]], 1, 32)
    [[[5], [6, 7]]]
    """
    rows = _listed(continuations, "continuations must be, for each context, a list of lists of token ids")
    if not _is_nested(rows):
        raise TypeError(
            "continuations must be, for each context, a list of lists of token ids, got a list of ids: wrap the only "
            "continuation of the only context as [[continuation]]"
        )
    if len(rows) != contexts:
        raise ValueError(f"continuations must hold one list per context, got {len(rows)} for {contexts} contexts")
    read = []
    for row, given in enumerate(rows):
        listed = _listed(given, f"the continuations of context {row} must be lists of token ids")
        if not listed:
            raise ValueError(f"each context needs at least one continuation, but context {row} has none: drop it")
        if not _is_nested(listed):
            raise TypeError(
                f"the continuations of context {row} must be lists of token ids, got a list of ids: wrap a single "
                "continuation as [continuation]"
            )
        found = [_ids(ids, f"continuation {j} of context {row}", vocab_size) for j, ids in enumerate(listed)]
        empty = next((j for j, ids in enumerate(found) if not ids), None)
        if empty is not None:
            raise ValueError(
                f"a continuation must hold at least one token, but continuation {empty} of context {row} is empty: "
                "drop it (its logprob is 0 by definition)"
            )
        read.append(found)
    return read


def _listed(values: Any, rule: str) -> list[Any]:
    """List the items of a list, tuple, array, tensor, column or generator."""
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{rule}, got text: encode it with the tokenizer first")
    listed = to_list(values)
    if listed is None:
        raise TypeError(f"{rule}, got {type(values).__name__}")
    return listed


def _is_nested(values: Sequence[Any]) -> bool:
    """Whether no item is a single id."""
    return not any(hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0 for value in values)


def _ids(given: Any, where: str, vocab_size: int) -> list[int]:
    """Read one context or continuation as a list of ids."""
    listed = _listed(given, f"{where} must be a list of token ids")
    try:
        ids = [operator.index(token) for token in listed]
        if any(isinstance(token, bool) for token in listed):
            raise TypeError
    except TypeError:
        odd = next(token for token in listed if isinstance(token, bool) or not hasattr(token, "__index__"))
        raise TypeError(f"{where} must be a list of token ids, got {odd!r} in it") from None
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token ids must lie in [0, {vocab_size}), got {token} at position {position} of {where}: check that "
                "tokenizer and model belong together"
            )
    return ids


def _check_fit(contexts: list[list[int]], continuations: list[list[list[int]]], most: int | None) -> None:
    """Refuse a text longer than the model's context, except for its last token, which is never forwarded."""
    if most is None:
        return
    for row, (context, listed) in enumerate(zip(contexts, continuations, strict=True)):
        for j, ids in enumerate(listed):
            if len(context) + len(ids) - 1 > most:
                raise ValueError(
                    f"a context and its continuation, but for the last token, must fit the model's context of {most} "
                    f"tokens, but continuation {j} of context {row} makes {len(context)} + {len(ids)}: cut the "
                    "context from the left"
                )
