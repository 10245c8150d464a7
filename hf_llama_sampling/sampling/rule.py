"""LLAMA2's sampling rule on tensors of any device: temperature, nucleus, race.

The names in facebookresearch/llama, ``llama/generation.py``, and here: the softmax in ``generate`` is
`softmax_with_temperature`; in ``sample_top_p`` the sort and the mask are `nucleus`, and ``multinomial`` is `race`.

The rule differs from transformers' top-p in one sentence: in descending order a token is dropped when the float32 mass
before it, computed as ``cumsum - p_i``, is strictly greater than ``top_p``, whereas transformers drops from the
ascending end where ``cumsum <= 1 - p``.

What this module does not do: it makes no random numbers (they come in as `Noise`), keeps no state, and never reads a
tensor on the host, so that no draw waits for its device. `fast_path` gives the same answers faster on CPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Temperatures beyond these act as these: all mass is on the best logit, or all tokens are equally probable.
COLDEST = 1e-30
HOTTEST = torch.finfo(torch.float32).max
_LARGEST = HOTTEST * (1 - 2**-22)  # up to this x, (x * T) / T stays finite: float32 rounds twice

Noise = Callable[[Tensor, Tensor | None], Tensor]
"""``noise(tokens, rows)``: Exp(1) values (R, K) for ids (R, K), by falling probability; rows (R,), None means all."""


class Nucleus(NamedTuple):
    """The tokens of each row, most probable first. Shapes (B, K), K <= V."""

    tokens: Tensor  # ids
    probs: Tensor  # descending
    dropped: Tensor  # bool: outside the nucleus


class Draw(NamedTuple):
    """One token per row. Shapes (B,)."""

    tokens: Tensor  # ids
    softmax_probs: Tensor  # of the tokens, over the whole vocabulary after temperature; nan for logits with nan or inf
    nucleus_mass: Tensor | None = None  # sum of the nucleus' `softmax_probs`; None where nobody asked for it

    @property
    def probs(self) -> Tensor:
        """(B,): the probability that each token was drawn with, in its renormalized nucleus."""
        assert self.nucleus_mass is not None
        return self.softmax_probs / self.nucleus_mass


def scale(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``logits / temperature`` in float32. logits: (B, V); temperature: a number, or (B, 1), above 0.

    Where the best quotient of a row would overflow, the row is shifted down to 0, which changes no probability.
    """
    logits, temperature = logits.float(), within_float32(temperature)
    best = logits.amax(-1, keepdim=True)
    shift = _zero_below(best, _LARGEST * temperature)
    return (logits - shift) / temperature


def _zero_below(values: Tensor, bound: float | Tensor) -> Tensor:
    """Values (B, 1) whose magnitude is above `bound`, and 0 for the others."""
    if isinstance(bound, Tensor):
        return values * (values.abs() > bound)
    return torch.nn.functional.hardshrink(values, min(bound, HOTTEST))


def within_float32(temperature: float | Tensor) -> float | Tensor:
    """Clamp the temperature to what float32 can divide by."""
    if isinstance(temperature, Tensor):
        return temperature.clamp(COLDEST, HOTTEST)
    return min(max(temperature, COLDEST), HOTTEST)


def softmax_with_temperature(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """``softmax(logits / temperature)`` in float32, (B, V); a row with nan, +inf or only -inf becomes nan."""
    return torch.softmax(scale(logits, temperature), dim=-1)


def nucleus(probs: Tensor, top_p: float | Tensor, *, stable: bool = False) -> Nucleus:
    """Sort, and drop each token with more than `top_p` before it. probs: (B, V) float32; top_p: a number, or (B, 1)."""
    ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=stable)
    return Nucleus(tokens, ordered, ordered.cumsum(-1) - ordered > top_p)


def keep_mask(probs: Tensor, top_p: float | Tensor) -> Tensor:
    """(B, V) bool: the tokens in the nucleus."""
    return mask_of(nucleus(probs, top_p), probs)


def draw_by_rank(probs: Tensor, top_p: float | Tensor, noise: Noise) -> Draw:
    """Draw as the reference does: over the sorted, renormalized nucleus, noise indexed by rank.

    Equal to ``torch.multinomial`` over those probabilities when the noise is what
    ``torch.empty_like(probs).exponential_()`` draws from the same generator.
    """
    found = nucleus(probs, top_p)
    mass = mass_of(found)
    return race(found, found.probs / mass, noise(found.tokens, None), mass)


def draw_by_token(probs: Tensor, top_p: float | Tensor, noise: Noise, *, with_mass: bool = True) -> Draw:
    """Draw with noise that belongs to the token ids, whatever their order.

    The sort is stable: where equal probabilities straddle the nucleus' edge, the lower ids are kept on every device.
    """
    found = nucleus(probs, top_p, stable=True)
    return race(found, found.probs, noise(found.tokens, None), mass_of(found) if with_mass else None)


def race(found: Nucleus, weights: Tensor, noise: Tensor, mass: Tensor | None) -> Draw:
    """The token with the largest ``weight / Exp(1)`` of each row; it wins with its share of the weights."""
    scores = (weights / noise).masked_fill_(found.dropped, -1.0)
    winner = scores.argmax(-1, keepdim=True)
    tokens, probs = found.tokens.gather(1, winner), found.probs.gather(1, winner)
    return Draw(tokens.squeeze(1), probs.squeeze(1), None if mass is None else mass.squeeze(1))


def mass_of(found: Nucleus) -> Tensor:
    """(B, 1): the sum of the nucleus' probabilities."""
    return found.probs.masked_fill(found.dropped, 0.0).sum(-1, keepdim=True)


def mask_of(found: Nucleus, probs: Tensor) -> Tensor:
    """(B, V) bool: the nucleus at its tokens' places; a token that `found` does not hold is outside."""
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, found.tokens, ~found.dropped)
