"""Group requests into batches: order them by shared prefix and length, then find the cheapest cuts.

A batch's content depends on the requests and the limits alone, not on processes or on earlier answers. This module runs
no model; its costs assume that `generate` and `score_tokens` forward a common prefix once per batch.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np
from numpy.typing import NDArray

from .requests import Request

_FAMILY = 4  # keep requests together if they share a quarter of their longest prompt
_CALL = 64  # fixed cost of one forward, in prompt tokens, in addition to its own tokens

Family = list[Union[Request, "Family"]]


def batches(
    requests: Sequence[Request], *, rows: int, tokens: int, whole_tree: bool = False
) -> Iterator[list[Request]]:
    """Cut requests into batches of at most `rows` requests and `tokens` tokens (see `cost`).

    Args:
        requests: in any order; the batches are the same.
        rows, tokens: limits; a request alone may have more tokens.
        whole_tree: whether a batch shares prefixes at every branch of its tree, as in scoring, or only the prefix
            common to all and equal prompts, as in generation.
    """
    ordered = prefix_order(requests)
    cuts = _best_cuts(ordered, rows, tokens, whole_tree=whole_tree)
    for start, end in itertools.pairwise(cuts):
        yield ordered[start:end]


def cost(batch: Sequence[Request]) -> int:
    """Rows x (longest prompt + most new tokens): the tokens of cache, and roughly the time, that a batch needs."""
    return len(batch) * (max(len(r.prompt) for r in batch) + max(r.limit for r in batch))


# The order


def prefix_order(requests: Sequence[Request]) -> list[Request]:
    """Order by length, longest first, but keep prompts that share a prefix together, in nested families.

    A family is a set of prompts whose common prefix is at least a quarter of the longest of them; in an inner family, a
    quarter of the part after the outer prefix. Grouping by shorter prefixes would save little and mix lengths.
    """
    ordered = sorted(requests, key=lambda request: (request.prompt, -request.limit, request.index))
    return list(_longest_first(_families(ordered)))


def _families(ordered: Sequence[Request]) -> Family:
    """Build the tree of families from requests that are sorted by their token ids."""
    shared = [0, *(common_length(a.prompt, b.prompt) for a, b in itertools.pairwise(ordered))]
    everything: Family = []
    to_split = [(0, len(ordered), 0, everything)]
    while to_split:
        start, end, prefix, family = to_split.pop()
        if end - start <= 1:
            family.extend(ordered[start:end])
            continue
        common = min(shared[start + 1 : end])
        longest = max(len(request.prompt) for request in ordered[start:end])
        if common > prefix and _FAMILY * (common - prefix) >= longest - prefix:
            inner: Family = []
            family.append(inner)
            prefix, family = common, inner
        branches = [start, *(at for at in range(start + 1, end) if shared[at] == common), end]
        to_split += [(first, last, prefix, family) for first, last in itertools.pairwise(branches)]
    return everything


def _longest_first(family: Family) -> Iterator[Request]:
    """Yield a family's requests and inner families, those with the longest prompt first."""
    groups = [[unit] if isinstance(unit, Request) else list(_longest_first(unit)) for unit in family]
    for group in sorted(groups, key=lambda g: (-len(g[0].prompt), g[0].prompt, -g[0].limit, g[0].index)):
        yield from group


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix.

    >>> common_length([1, 5, 6], [1, 5, 7, 8])
    2
    """
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


# The cuts


def _best_cuts(ordered: Sequence[Request], rows: int, tokens: int, *, whole_tree: bool) -> list[int]:
    """Cut an ordered list so that the batches cost least in total (dynamic programming over the end of the last batch).

    Costs are in prompt tokens. A batch forwards its common prefix once, then each distinct prompt, padded to the
    longest; each of its steps costs one token per row, plus `_CALL`. With `whole_tree` a batch costs the tokens of its
    prompts' tree, plus `_CALL`.
    """
    count = len(ordered)
    lengths = np.array([len(request.prompt) for request in ordered])
    limits = np.array([request.limit for request in ordered])
    shared = np.array([0, *(common_length(a.prompt, b.prompt) for a, b in itertools.pairwise(ordered))])
    new = np.array([1, *(a.prompt != b.prompt for a, b in itertools.pairwise(ordered))])
    best: NDArray[np.float64] = np.zeros(count + 1)
    start_of = np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        # Candidates for the batch's start: end - 1, end - 2, ...; all arrays below have one entry per candidate.
        span = slice(max(0, end - rows), end)
        sizes = np.arange(1, end - span.start + 1)
        longest, most = (np.maximum.accumulate(values[span][::-1]) for values in (lengths, limits))
        inner = np.concatenate(
            [[lengths[end - 1]], shared[span][:0:-1]]
        )  # prefix shared with the prompt before, within the batch
        distinct = np.concatenate([[1], 1 + np.cumsum(new[span][:0:-1])])
        if whole_tree:
            edges = np.cumsum(lengths[span][::-1]) - np.cumsum(np.concatenate([[0], inner[1:]]))
            price = edges + _CALL
        else:
            prefix = np.minimum.accumulate(inner)
            price = prefix + distinct * (longest - prefix) + most * sizes + (most + 1) * _CALL
        fits = (sizes * (longest + most) <= tokens) | (sizes == 1)
        totals = np.where(fits, best[span][::-1] + price, np.inf)
        choice = int(np.argmin(totals))
        best[end], start_of[end] = totals[choice], end - 1 - choice
    cuts = [count]
    while cuts[-1] > 0:
        cuts.append(int(start_of[cuts[-1]]))
    return cuts[::-1]
