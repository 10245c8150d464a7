"""LLAMA2's nucleus as pure tensor functions: temperature, which tokens stay, who wins the draw.

The rule differs from transformers' top-p in one sentence: in descending order a token is dropped when the float32 mass
before it, computed as ``cumsum - p_i``, is strictly greater than ``top_p`` (facebookresearch/llama,
``llama/generation.py``, ``sample_top_p``), whereas transformers drops from the ascending end where ``cumsum <= 1 - p``.

What this module does not do: it draws no random number, keeps no state and knows no transformers class.

A sort of the whole vocabulary costs more than everything else in a draw, and a nucleus is usually a few tokens. So on
CPU the largest `WINDOW` probabilities are looked at first, and the sort is left out where they prove the same answer:

* the mass before the last one exceeds ``top_p`` by more than float32 rounding, so no token outside can be kept;
* no tie decides anything: ``torch.sort`` is not stable, so among equal probabilities only the very same call gives the
  very same order.

Where the proof fails for a row, it is sorted by radix: floats of one sign are ordered as the integers that their bits
spell, and torch sorts integers several times faster, though among equal ones in an order of its own. On other devices
every row is sorted as the reference sorts: looking at the proof would make the host wait for the device.
"""

from collections.abc import Callable
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

WINDOW = 256
# `cumsum - p_i` is computed with an error below 2e-7 (half an ulp for each of its three roundings, all values below 2).
ROUNDING = 1e-6
# From so many on torch sorts integers by radix. Filling a row up to it pays from about a quarter on.
RADIX = 32768
# Below this, logits / temperature may overflow float32, and the distribution is the argmax's to the last bit.
COLDEST = 1e-30

Noise = Callable[[Tensor, Tensor | None], Tensor]
"""``noise(tokens, rows)``: Exp(1) values for the token ids ``tokens`` (R, K), best first, of batch rows ``rows``."""


class Nucleus(NamedTuple):
    """The tokens of each row from the most probable down, as far as anyone looked. Shapes (B, K), K <= V."""

    ordered: Tensor  # probabilities, descending
    probs: Tensor  # the same, renormalized over the kept ones, 0 where dropped
    tokens: Tensor  # ids
    kept: Tensor  # bool


class Draw(NamedTuple):
    """One token per row and the probability it was drawn with."""

    tokens: Tensor  # (B,) ids
    probs: Tensor  # (B,)


def softmax_with_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``softmax(logits / temperature)`` in float32. logits: (B, V); temperature: a number, or (B, 1), above 0."""
    logits = logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature.clamp(min=COLDEST)
        too_cold = temperature <= COLDEST
        return torch.softmax((logits - too_cold * logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if temperature < COLDEST:
        return torch.softmax((logits - logits.amax(-1, keepdim=True)) / COLDEST, dim=-1)
    return torch.softmax(logits / temperature, dim=-1)


def sorted_nucleus(probs: Tensor, top_p: float | Tensor, *, stable: bool = False) -> Nucleus:
    """The rule itself, over the whole vocabulary. probs: (B, V) float32; top_p: a number, or (B, 1)."""
    return _cut(*torch.sort(probs, dim=-1, descending=True, stable=stable), top_p)


def radix_nucleus(probs: Tensor, top_p: float | Tensor) -> Nucleus:
    """``sorted_nucleus(stable=True)`` on CPU, bit for bit and several times faster."""
    size = probs.shape[-1]
    if size < RADIX // 4:
        return sorted_nucleus(probs, top_p, stable=True)
    ordered, tokens = torch.empty_like(probs), torch.empty_like(probs, dtype=torch.long)
    keys = torch.full((max(size, RADIX),), torch.iinfo(torch.int32).max, dtype=torch.int32)
    for row, values in enumerate(probs):
        torch.neg(values.view(torch.int32), out=keys[:size])
        ascending, order = torch.sort(keys, stable=True)  # by radix only if ascending and of one dimension
        torch.neg(ascending[:size], out=ordered[row].view(torch.int32))
        tokens[row] = order[:size]
    return _cut(ordered, tokens, top_p)


def _cut(ordered: Tensor, tokens: Tensor, top_p: float | Tensor) -> Nucleus:
    """The nucleus of sorted probabilities."""
    kept = ordered.cumsum(-1).sub_(ordered) <= top_p
    probs = ordered.masked_fill(~kept, 0.0)
    return Nucleus(ordered, probs.div_(probs.sum(-1, keepdim=True)), tokens, kept)


def windowed_nucleus(probs: Tensor, top_p: float | Tensor, *, width: int) -> tuple[Nucleus, Tensor]:
    """The rule over the `width` largest probabilities, and (B,) which rows it is proved complete for.

    Of a complete row, probabilities and the number of kept tokens equal `sorted_nucleus` bit for bit; ids may differ
    from it among equal probabilities.
    """
    ordered, tokens = torch.topk(probs, width)
    before = ordered.cumsum(-1) - ordered
    kept = before <= top_p
    complete = before[:, -1:] > top_p + ROUNDING if width < probs.shape[-1] else kept.new_ones(len(kept), 1)
    # float32 sums depend on the order and the length of what is summed: sum the reference's very row, zeros included.
    row = torch.zeros_like(probs)
    row[:, :width] = ordered.masked_fill(~kept, 0.0)
    return Nucleus(ordered, row[:, :width] / row.sum(-1, keepdim=True), tokens, kept), complete.squeeze(-1)


def nucleus_mask(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """(B, V) bool: the tokens that the rule keeps. probs: (B, V) float32."""
    if not on_cpu(probs):
        return _scattered(sorted_nucleus(probs, top_p), probs)
    nucleus, complete = windowed_nucleus(probs, top_p, width=min(WINDOW, probs.shape[-1]))
    mask = _scattered(nucleus, probs)
    rows = _where_not(complete & ~_boundary_tie(nucleus))
    if rows is not None:
        some, p = _rows_of(probs, rows), _rows_of(top_p, rows)
        nucleus = radix_nucleus(some, p)
        mask[rows] = _scattered(nucleus, some)
        tied = _where_not(~_boundary_tie(nucleus))
        if tied is not None:
            rest = _rows_of(some, tied)
            mask[rows[tied]] = _scattered(sorted_nucleus(rest, _rows_of(p, tied)), rest)
    return mask


def sample_by_rank(probs: Tensor, top_p: float | Tensor, noise: Noise) -> Draw:
    """Draw as the reference does: the race ``argmax(p / Exp(1))`` over the *sorted* nucleus, noise indexed by rank.

    Equal to ``torch.multinomial`` over the sorted, renormalized probabilities when the noise is what
    ``torch.empty_like(probs).exponential_()`` draws from the same generator.
    """
    if not on_cpu(probs):
        return _race(sorted_nucleus(probs, top_p), noise, None)[0]
    nucleus, complete = windowed_nucleus(probs, top_p, width=min(WINDOW, probs.shape[-1]))
    draw, rank = _race(trim_nucleus(nucleus), noise, None)
    rows = _where_not(complete & ~_tied(nucleus.ordered, rank))
    if rows is not None:
        some, p = _rows_of(probs, rows), _rows_of(top_p, rows)
        nucleus = radix_nucleus(some, p)
        exact, rank = _race(nucleus, noise, rows)
        draw = _replaced(draw, rows, exact)
        tied = _where_not(~_tied(nucleus.ordered, rank))
        if tied is not None:
            exact, _ = _race(sorted_nucleus(_rows_of(some, tied), _rows_of(p, tied)), noise, rows[tied])
            draw = _replaced(draw, rows[tied], exact)
    return draw


def sample_by_token(probs: Tensor, top_p: float | Tensor, noise: Noise) -> Draw:
    """Draw with noise that belongs to the token ids: the same race, whatever order the tokens stand in.

    Where equal probabilities straddle the nucleus' edge, the lower ids are kept, on every device.
    """
    if not on_cpu(probs):
        return _race_by_token(sorted_nucleus(probs, top_p, stable=True), noise, None)
    nucleus, complete = windowed_nucleus(probs, top_p, width=min(WINDOW, probs.shape[-1]))
    draw = _race_by_token(trim_nucleus(nucleus), noise, None)
    rows = _where_not(complete & ~_boundary_tie(nucleus))
    if rows is not None:
        nucleus = radix_nucleus(_rows_of(probs, rows), _rows_of(top_p, rows))
        draw = _replaced(draw, rows, _race_by_token(trim_nucleus(nucleus), noise, rows))
    return draw


def _race(nucleus: Nucleus, noise: Noise, rows: Tensor | None) -> tuple[Draw, Tensor]:
    """The winner of ``p / Exp(1)`` in each row, and its rank (B, 1). A dropped token cannot win: its score is -1."""
    scores = nucleus.probs / noise(nucleus.tokens, rows)
    rank = scores.masked_fill_(~nucleus.kept, -1.0).argmax(-1, keepdim=True)
    return Draw(nucleus.tokens.gather(1, rank).squeeze(1), nucleus.probs.gather(1, rank).squeeze(1)), rank


def _race_by_token(nucleus: Nucleus, noise: Noise, rows: Tensor | None) -> Draw:
    """The same over the raw probabilities, which do not depend on how far anyone looked."""
    scores = (nucleus.ordered / noise(nucleus.tokens, rows)).masked_fill_(~nucleus.kept, -1.0)
    rank = scores.argmax(-1, keepdim=True)
    return Draw(nucleus.tokens.gather(1, rank).squeeze(1), nucleus.probs.gather(1, rank).squeeze(1))


def _scattered(nucleus: Nucleus, probs: Tensor) -> Tensor:
    """(B, V) bool: `kept`, at its tokens' places."""
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, nucleus.tokens, nucleus.kept)


def _replaced(draw: Draw, rows: Tensor, exact: Draw) -> Draw:
    return Draw(draw.tokens.index_copy(0, rows, exact.tokens), draw.probs.index_copy(0, rows, exact.probs))


def _tied(ordered: Tensor, rank: Tensor) -> Tensor:
    """(B,): another rank holds the winner's probability, so that the token hangs on the sort. ordered: (B, K)."""
    last = ordered.shape[-1] - 1
    value = ordered.gather(1, rank)
    above = (ordered.gather(1, (rank - 1).clamp(min=0)) == value) & (rank > 0)
    below = (ordered.gather(1, (rank + 1).clamp(max=last)) == value) & (rank < last)
    return (above | below).squeeze(1)


def _boundary_tie(nucleus: Nucleus) -> Tensor:
    """(B,): a kept and a dropped token have the same probability, so that which is kept hangs on the sort."""
    edge = nucleus.kept[:, 1:] != nucleus.kept[:, :-1]
    return (edge & (nucleus.ordered[:, 1:] == nucleus.ordered[:, :-1])).any(-1)


def trim_nucleus(nucleus: Nucleus) -> Nucleus:
    """The same nucleus without the columns in which every row has dropped its token. CPU only: it looks."""
    # Rounding can drop a token and keep a later one, so counting the kept ones would not do. Nan keeps none.
    kept = nucleus.kept.any(0).numpy().nonzero()[0]
    wide = int(kept[-1]) + 1 if len(kept) else 1
    return Nucleus(*(column[:, :wide] for column in nucleus))


def on_cpu(probs: Tensor) -> bool:
    """Reading a CPU tensor is a memory access; reading any other makes the host wait for the device."""
    return probs.device.type == "cpu"


def _where_not(sure: Tensor) -> Tensor | None:
    """The rows (R,) where `sure` (B,) is false, or None where there are none. CPU only: it looks."""
    rows = (~sure).numpy().nonzero()[0]
    if len(rows) == 1 < len(sure):
        rows = rows.repeat(2)  # with several threads torch sums a lone row in another order than a row of several
    return torch.from_numpy(rows) if len(rows) else None


@overload
def _rows_of(values: Tensor, rows: Tensor) -> Tensor: ...
@overload
def _rows_of(values: float | Tensor, rows: Tensor) -> float | Tensor: ...
def _rows_of(values: float | Tensor, rows: Tensor) -> float | Tensor:
    """These rows of (B, ...); a number is every row's. All rows in order are not copied."""
    return values if not isinstance(values, Tensor) or _all(rows, len(values)) else values[rows]


def _all(rows: Tensor, count: int) -> bool:
    return np.array_equal(rows.numpy(), np.arange(count))
