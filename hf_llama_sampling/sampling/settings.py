"""The settings of a draw as one frozen value: checked once where a call comes in, read in every step.

What this module does not do: it draws nothing, and it does not know how many rows a batch has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checks import both_streams, check_temperature, check_top_p, per_row, seeds_as_given
from ..defaults import TEMPERATURE, TOP_P

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn: temperature, nucleus, and which random numbers.

    Args:
        temperature: 0 (greedy) or above, one for all rows or one per row.
        top_p: from 0 to 1, one for all rows or one per row.
        seeds: one stream per row: an int (`seed, seed + 1, ...`) or one per row.
        generator: Meta's stream from this generator; torch's global one if neither is given.

    Raises:
        ValueError: a value out of range, or `seeds` together with `generator`.

    >>> SamplingSettings(0.8, [0.9, 0.5])
    SamplingSettings(temperature=0.8, top_p=(0.9, 0.5), seeds=None, generator=None)
    """

    temperature: float | Sequence[float] = TEMPERATURE
    top_p: float | Sequence[float] = TOP_P
    seeds: int | Sequence[int] | None = None
    generator: "torch.Generator | None" = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.generator is not None:
            raise ValueError(both_streams())
        checked = {
            "temperature": per_row("temperature", self.temperature, check_temperature),
            "top_p": per_row("top_p", self.top_p, check_top_p),
            "seeds": None if self.seeds is None else seeds_as_given(self.seeds),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
