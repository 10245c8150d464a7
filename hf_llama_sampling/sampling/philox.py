"""Philox, the counter-based generator of the per-prompt streams, on tensors and on NumPy arrays.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11). A word is a function of a counter and a key alone,
so any of them can be computed at any time, in any order, on any device. Words are int64 in [0, 2**32), since torch has
no unsigned arithmetic on all devices.

What this module does not do: it keeps no state and does not say what counters and keys stand for (`streams` does).
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # the low 32 bits
_MULTIPLIER_2 = 0xD256D193
_MULTIPLIERS_4 = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SPAN = 1 << 16  # words computed at once in NumPy
_FEW = 8  # words that Python computes in less time than NumPy

Array = np.ndarray[Any, np.dtype[np.int64]]
Words = TypeVar("Words", Tensor, Array, int)


def philox2x32(counter0: Words, counter1: Words, key: Words) -> Words:
    """The first word of Philox2x32-10; `counter0` has the result's shape, the others broadcast to it.

    int64 products wrap modulo 2**64: their low word is right, and so is their high word below its sign extension. Bits
    above the 32 of a word are masked off once a round, before the next product.
    """
    left, right = counter0, counter1
    for round_ in range(_ROUNDS):
        product = left * _MULTIPLIER_2
        left = product >> 32
        left ^= right
        left ^= key + round_ * _WEYL[0]
        left &= WORD
        right = product
    return left


def philox2x32_in_numpy(counter0: Tensor, salts: Array, keys: Array) -> Tensor:
    """`philox2x32` of a CPU tensor (R, K) and arrays (R, 1): NumPy starts an operation in a third of torch's time.

    A few words are faster still in Python. Large arrays are computed in spans that stay in the cache; beyond it each
    operation would wait for fresh pages.
    """
    ids = counter0.numpy()
    if ids.size <= _FEW:
        rows = zip(ids.tolist(), salts[:, 0].tolist(), keys[:, 0].tolist(), strict=True)
        return torch.tensor([[philox2x32(one, salt, key) for one in row] for row, salt, key in rows])
    if ids.size <= _SPAN:
        return torch.from_numpy(philox2x32(ids, salts, keys))
    words = np.empty(ids.shape, dtype=np.int64)
    for row in range(len(ids)):
        for first in range(0, ids.shape[1], _SPAN):
            span = slice(first, first + _SPAN)
            words[row, span] = philox2x32(ids[row, span], salts[row], keys[row])
    return torch.from_numpy(words)


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, Words, Words, Words]:
    """The four words of Philox4x32-10, of tensors or arrays that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS_4[0], c2 * _MULTIPLIERS_4[1]
        c0, c1 = ((second >> 32) ^ c1 ^ k0) & WORD, second & WORD
        c2, c3 = ((first >> 32) ^ c3 ^ k1) & WORD, first & WORD
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3
