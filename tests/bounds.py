"""How far two float32 runs of one model may lie apart: float32 steps, counted from the model's shape.

Runs that add the same products in another order (another batch, padding, chunk, schedule, number of threads or
instruction set) round differently. Tests compare them within a bound that follows from the arithmetic below, never
within what one machine happened to give. Where both sides run the same operations, tests ask for equality.
"""

import math
from typing import Any

import torch

# No logit or logprob of the models that tests use is larger, see test_bounds.py; a float32 step below it is 1.9e-6.
LOGITS = 32.0


STEPS = 125  # `forward_steps` of the bundled model; the other models of tests are smaller, the 135M weights apart


def step(size: float) -> float:
    """The distance between neighbouring float32 numbers just below `size`; a float32 has 24 significant bits.

    >>> step(28.0) == step(32.0) == 2.0**-19
    True
    """
    return 2.0 ** (math.ceil(math.log2(size)) - 24)


def float32_steps(values: Any, n: float) -> float:
    """`n` float32 steps at the largest magnitude in `values`: a number, numbers in nested lists, or a tensor."""
    return n * step(float(torch.as_tensor(values, dtype=torch.float64).abs().max()))


def forward_steps(config: Any) -> int:
    """Steps by which one logit may differ between two runs of a model that differ in the order of additions alone.

    A sum of K products rounds K times, each time by at most half a step of the sum, 0.29 steps in the mean square,
    and in either direction: sqrt(K) * 0.29 steps in all. The residual stream takes two such sums from each of L
    layers, the head adds one: sqrt(K * (2 * L + 1)) * 0.29. Two runs part by sqrt(2) times that, and six standard
    deviations leave no false alarm among millions of values: 6 * sqrt(2) * 0.29 = 2.5, taken as 3. K is the hidden
    size; kernels that add in eight or sixteen lanes round less often.
    """
    text = config.get_text_config()
    return math.ceil(3 * math.sqrt(text.hidden_size * (2 * text.num_hidden_layers + 1)))


def rounding(model: Any, size: float = LOGITS) -> float:
    """The bound on a logit or a logprob of `model` in float32, where its logits are at most `size`."""
    return forward_steps(model.config) * step(size)


def rounding_in_16_bits(model: Any, dtype: torch.dtype, size: float) -> float:
    """The same where activations have 16 bits, for logits of a usual `size`.

    Sums run in float32; some ten results a layer, and the logits, are rounded to `dtype`: 3 * sqrt(10 * L + 1) of its
    steps, with the 3 of `forward_steps`.
    """
    layers = model.config.get_text_config().num_hidden_layers
    return 3 * math.sqrt(10 * layers + 1) * torch.finfo(dtype).eps * 2.0 ** math.ceil(math.log2(size)) / 2


def relative(roundings: int, condition: float = 1.0) -> float:
    """So many float32 roundings of half a step each, as a part of the value; `condition` is how much they grow."""
    return roundings * 2.0**-24 * condition


# The bound for the bundled model and for smaller ones: 2.4e-4.
ROUNDING = STEPS * step(LOGITS)
