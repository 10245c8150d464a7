"""Which requests go together: first an order that keeps shared prefixes and like lengths close, then the best cuts.

What a batch holds depends on the requests and the limits alone: not on processes, nor on what was answered before.
This module runs no model; it knows what sharing saves, since `generate` and `score_tokens` read a prefix once a batch.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Union

import numpy as np
from numpy.typing import NDArray

from .requests import Request

_FAMILY = 4  # requests are kept together if they share a quarter of what their longest prompt holds
_CALL = 64  # one forward costs what so many tokens of a prompt cost, and its own tokens beside

Family = list[Union[Request, "Family"]]


def batches(
    requests: Sequence[Request], *, rows: int, tokens: int, whole_tree: bool = False
) -> Iterator[list[Request]]:
    """Cut requests into batches of at most `rows` requests and `tokens` tokens (see `cost`).

    Args:
        requests: in any order; the batches are the same.
        rows, tokens: limits; a request alone may have more tokens.
        whole_tree: whether prefixes are shared at every branch, as in scoring, or one for the whole batch and one
            among equal prompts, as in generation.
    """
    ordered = prefix_order(requests)
    cuts = _best_cuts(ordered, rows, tokens, whole_tree=whole_tree)
    for start, end in itertools.pairwise(cuts):
        yield ordered[start:end]


def cost(batch: Sequence[Request]) -> int:
    """Rows x (longest prompt + most new tokens): what a batch takes of cache, and about what it takes of time."""
    return len(batch) * (max(len(r.prompt) for r in batch) + max(r.limit for r in batch))


# The order


def prefix_order(requests: Sequence[Request]) -> list[Request]:
    """Longest prompts first, and those that share a prefix one after the other, families within families.

    A family is a set of prompts with a common prefix that holds a quarter of the longest of them; within a family that
    quarter is of what follows the family's prefix. Smaller shares would scatter the lengths for little.
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
    """A family's requests and inner families, by their longest prompt."""
    groups = [[unit] if isinstance(unit, Request) else list(_longest_first(unit)) for unit in family]
    for group in sorted(groups, key=lambda g: (-len(g[0].prompt), g[0].prompt, -g[0].limit, g[0].index)):
        yield from group


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning.

    >>> common_length([1, 5, 6], [1, 5, 7, 8])
    2
    """
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i in range(length) if a[i] != b[i])


# The cuts


def _best_cuts(ordered: Sequence[Request], rows: int, tokens: int, *, whole_tree: bool) -> list[int]:
    """Where to cut an ordered list so that the batches cost least in sum, found from the last cut backwards.

    Costs are in tokens of a prompt. A batch reads its common prefix once and then each distinct prompt, padded to the
    longest; then each of its steps costs one token a row and `_CALL`. Where all branches are shared, each edge of the
    tree of prompts is read once.
    """
    count = len(ordered)
    lengths = np.array([len(request.prompt) for request in ordered])
    limits = np.array([request.limit for request in ordered])
    shared = np.array([0, *(common_length(a.prompt, b.prompt) for a, b in itertools.pairwise(ordered))])
    new = np.array([1, *(a.prompt != b.prompt for a, b in itertools.pairwise(ordered))])
    best: NDArray[np.float64] = np.zeros(count + 1)
    start_of = np.zeros(count + 1, dtype=int)
    for end in range(1, count + 1):
        # Candidates begin at end - 1, end - 2, ...: everything below is an array over them.
        span = slice(max(0, end - rows), end)
        sizes = np.arange(1, end - span.start + 1)
        longest, most = (np.maximum.accumulate(values[span][::-1]) for values in (lengths, limits))
        inner = np.concatenate(
            [[lengths[end - 1]], shared[span][:0:-1]]
        )  # shared with the one before, within the batch
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
