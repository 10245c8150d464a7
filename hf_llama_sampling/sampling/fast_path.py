"""The functions of `rule` on CPU: the same answers bit for bit, without sorting the vocabulary in most draws.

A sort of the whole vocabulary costs more than everything else in a draw, and a nucleus is usually a few tokens. Each
row takes the first of three steps that is proved to give the rule's answer (`_first_sure`):

1. Window: ``topk`` finds the `WINDOW` largest probabilities. This is enough where the mass before the last of them
   exceeds ``top_p`` by more than float32 rounding, so that no token outside can be kept, and no tie decides anything:
   ``torch.sort`` is not stable, so among equal probabilities only the very same call gives the very same order.
2. Radix sort: floats of one sign are ordered as the integers that their bits spell, and torch sorts integers several
   times faster. Equal ones come in another order than in ``torch.sort``, so again no tie may decide.
3. The rule's own sort.

The generator's draws have a fast path too: `exponential_of_words` computes Exp(1) values for the few ranks of a nucleus
from raw 64-bit words, whose logarithms would cost several times the words.

What this module does not do: it serves no other device, where looking at a proof would make the host wait.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from . import rule
from .rule import Draw, Noise, Nucleus, mask_of

WINDOW = 256
# `cumsum - p_i` is computed with an error below 2e-7 (half an ulp for each of its three roundings, all values below 2).
ROUNDING = 1e-6
# From this many values on torch sorts integers by radix. Filling a row up to it pays from about a quarter on.
RADIX = 32768

Answer = TypeVar("Answer", Tensor, Draw)
# Small questions about a window are asked of its memory as NumPy sees it, which answers in a third of torch's time.
Mask = np.ndarray[Any, Any]  # of bool


def on_cpu(values: Tensor | torch.device) -> bool:
    """Reading a CPU tensor is a memory access; reading any other makes the host wait for the device."""
    return (values.device if isinstance(values, Tensor) else values).type == "cpu"


def softmax_with_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`rule.softmax_with_temperature`, which guards against an overflow only where nan shows one. logits: (B, V)."""
    probs = torch.softmax(logits.float() / rule.within_float32(temperature), dim=-1)
    overflow = any(map(math.isnan, probs[:, 0].tolist()))
    return rule.softmax_with_temperature(logits, temperature) if overflow else probs


def keep_mask(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """`rule.keep_mask`. probs: (B, V) float32; top_p: a number, or (B, 1)."""
    return _first_sure(
        probs, top_p, lambda found, some, rows: mask_of(found, some), lambda found, mask: _tie_at_the_edge(found)
    )


def draw_by_rank(probs: Tensor, top_p: float | Tensor, noise: Noise) -> Draw:
    """`rule.draw_by_rank`. probs: (B, V) float32; top_p: a number, or (B, 1)."""

    def race(found: Nucleus, some: Tensor, rows: Tensor | None) -> Draw:
        found = trim_nucleus(found)
        if found.tokens.shape[1] == 1:
            return _alone(found, with_mass=True)
        mass = _mass_of(found, some)
        return rule.race(found, found.probs / mass, noise(found.tokens, rows), mass)

    return _first_sure(probs, top_p, race, lambda found, draw: _is_not_unique(found, draw.softmax_probs))


def draw_by_token(probs: Tensor, top_p: float | Tensor, noise: Noise, *, with_mass: bool = True) -> Draw:
    """`rule.draw_by_token`. probs: (B, V) float32; top_p: a number, or (B, 1)."""

    def race(found: Nucleus, some: Tensor, rows: Tensor | None) -> Draw:
        found = trim_nucleus(found)
        if found.tokens.shape[1] == 1:
            return _alone(found, with_mass=with_mass)
        return rule.race(found, found.probs, noise(found.tokens, rows), _mass_of(found, some) if with_mass else None)

    # The radix sort is stable, as the rule's sort is here, so its answer is final.
    return _first_sure(probs, top_p, race, lambda found, draw: _tie_at_the_edge(found), last=radix_nucleus)


def _first_sure(
    probs: Tensor,
    top_p: float | Tensor,
    answer_with: Callable[[Nucleus, Tensor, Tensor | None], Answer],
    tie_decides: Callable[[Nucleus, Answer], Mask],
    *,
    last: Callable[[Tensor, float | Tensor], Nucleus] = rule.nucleus,
) -> Answer:
    """Answer each row by the first of the window, the radix sort and the rule's sort that is sure.

    Args:
        answer_with: ``(nucleus, probs, rows)``: the answer of R rows from their nucleus; `probs` (R, V) are theirs, and
            `rows` their indices in the batch, None for all.
        tie_decides: ``(nucleus, answer)``: (R,), where the order of equal probabilities decides the answer.
        last: the sort whose answer is final.
    """
    found, incomplete = windowed_nucleus(probs, top_p, width=min(WINDOW, probs.shape[-1]))
    answer = answer_with(found, probs, None)
    rows = _rows_where(incomplete | tie_decides(found, answer))
    if rows is None:
        return answer
    some, p = _take(probs, rows), _take(top_p, rows)
    found = radix_nucleus(some, p)
    exact = answer_with(found, some, rows)
    answer = _replace(answer, rows, exact)
    tied = None if last is radix_nucleus else _rows_where(tie_decides(found, exact))
    if tied is None:
        return answer
    some, rows = _take(some, tied), rows[tied]
    return _replace(answer, rows, answer_with(last(some, _take(p, tied)), some, rows))


def windowed_nucleus(probs: Tensor, top_p: float | Tensor, *, width: int) -> tuple[Nucleus, Mask]:
    """The rule over the `width` largest probabilities, and (B,) for which rows they may not be enough.

    Of the other rows, probabilities and which ranks are dropped equal `rule.nucleus` bit for bit; ids may differ from
    it among equal probabilities.
    """
    ordered, tokens = torch.topk(probs, width)
    before = ordered.cumsum(-1).sub_(ordered)
    if width == probs.shape[-1]:
        incomplete = np.zeros(len(probs), dtype=np.bool_)
    else:
        most = top_p.numpy()[:, 0] if isinstance(top_p, Tensor) else top_p
        incomplete = before.numpy()[:, -1] <= most + ROUNDING
    return Nucleus(tokens, ordered, before > top_p), incomplete


def radix_nucleus(probs: Tensor, top_p: float | Tensor) -> Nucleus:
    """``rule.nucleus(stable=True)``, several times faster."""
    size = probs.shape[-1]
    if size < RADIX // 4:
        return rule.nucleus(probs, top_p, stable=True)
    ordered, tokens = torch.empty_like(probs), torch.empty_like(probs, dtype=torch.long)
    keys = torch.full((max(size, RADIX),), torch.iinfo(torch.int32).max, dtype=torch.int32)
    for row, values in enumerate(probs):
        torch.neg(values.view(torch.int32), out=keys[:size])
        ascending, order = torch.sort(keys, stable=True)  # by radix only if ascending and of one dimension
        torch.neg(ascending[:size], out=ordered[row].view(torch.int32))
        tokens[row] = order[:size]
    return Nucleus(tokens, ordered, ordered.cumsum(-1).sub_(ordered) > top_p)


def trim_nucleus(found: Nucleus) -> Nucleus:
    """The same nucleus without the columns after the last one that any row keeps."""
    # Rounding can drop a token and keep a later one, so counting the kept ones would not do.
    kept = np.flatnonzero(~found.dropped.all(0).numpy())
    width = int(kept[-1]) + 1 if len(kept) else 1
    return Nucleus(*(column[:, :width] for column in found))


def _mass_of(found: Nucleus, probs: Tensor) -> Tensor:
    """`rule.mass_of` of a trimmed nucleus of `probs` (R, V): (R, 1)."""
    # A float32 sum depends on the length of the row: fill up with zeros to the length that the rule sums.
    kept = found.probs.masked_fill(found.dropped, 0.0)
    return torch.nn.functional.pad(kept, (0, probs.shape[1] - kept.shape[1])).sum(-1, keepdim=True)


def _alone(found: Nucleus, *, with_mass: bool) -> Draw:
    """The draw from a nucleus of one token in each row, which wins any race; a row of nan keeps more. Shapes (R, 1)."""
    return Draw(found.tokens[:, 0], found.probs[:, 0], found.probs[:, 0] if with_mass else None)


def _tie_at_the_edge(found: Nucleus) -> Mask:
    """(R,): a kept and a dropped token have the same probability, so that the sort decides which is kept."""
    dropped, probs = found.dropped.numpy(), found.probs.numpy()
    edge: Any = (dropped[:, 1:] != dropped[:, :-1]) & (probs[:, 1:] == probs[:, :-1])
    some: Mask = edge.any(-1)
    return some


def _is_not_unique(found: Nucleus, probs: Tensor) -> Mask:
    """(R,): another token of the nucleus or beside it has the winner's probability; probs: (R,), the winners'."""
    equal: Any = found.probs.numpy() == probs.numpy()[:, None]
    several: Mask = equal.sum(-1) > 1
    return several


def _rows_where(unsure: Mask) -> Tensor | None:
    """The rows (R,) where `unsure` (B,) is true, or None where there are none."""
    rows = np.flatnonzero(unsure)
    if len(rows) == 1 < len(unsure):
        rows = rows.repeat(2)  # with several threads torch sums a lone row in another order than a row of several
    return torch.from_numpy(rows) if len(rows) else None


@overload
def _take(values: Tensor, rows: Tensor) -> Tensor: ...
@overload
def _take(values: float | Tensor, rows: Tensor) -> float | Tensor: ...
def _take(values: float | Tensor, rows: Tensor) -> float | Tensor:
    """These rows of (B, ...); a number is every row's. All rows in order are not copied."""
    in_order = isinstance(values, Tensor) and np.array_equal(rows.numpy(), np.arange(len(values)))
    return values if in_order or not isinstance(values, Tensor) else values[rows]


def _replace(answer: Answer, rows: Tensor, exact: Answer) -> Answer:
    """The answer (B, ...) with these rows taken from `exact` (R, ...)."""
    if isinstance(answer, Tensor):
        return answer.index_copy(0, rows, exact)
    mass = answer.nucleus_mass
    if mass is not None and exact.nucleus_mass is not None:
        mass = mass.index_copy(0, rows, exact.nucleus_mass)
    tokens = answer.tokens.index_copy(0, rows, exact.tokens)
    return Draw(tokens, answer.softmax_probs.index_copy(0, rows, exact.softmax_probs), mass)


def exponential_of_words(words: Tensor) -> Tensor:
    """The float32 values that ``exponential_`` makes of these 64-bit words of a CPU generator; any shape.

    It takes ``-log1p(-u)`` in float64 of 53 bits and rounds to float32. torch's vectorized log1p and the C library's,
    which ``exponential_`` calls, may differ in the last bit of the float64. Where four times that would round to
    another float32, about once in 2**26 values, the C library is asked.
    """
    exact = (words & ((1 << 53) - 1)).double().mul_(-(2.0**-53)).log1p_()
    values = exact.float()
    # Rounding to float32 drops 29 bits of the float64. It is unsure where they are within 4 of one half.
    unsure = (exact.view(torch.long) + (4 - (1 << 28)) & ((1 << 29) - 1)) <= 8
    for place in zip(*unsure.numpy().nonzero(), strict=True):
        values[place] = math.log1p(-float(int(words[place]) & ((1 << 53) - 1)) * 2.0**-53)
    return values.neg_()


@functools.cache
def words_make_exponentials() -> bool:
    """Whether this build of torch makes Exp(1) values as `exponential_of_words` does; one with MKL may not."""
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    values = exponential_of_words(torch.empty(1000, dtype=torch.long).random_(generator=one))
    as_torch_does = torch.empty(1000).exponential_(generator=other)
    return torch.equal(values, as_torch_does) and torch.equal(one.get_state(), other.get_state())
