"""The settings of a draw as one frozen value: checked once where a call comes in, read in every step.

What this module does not do: it draws nothing, and it imports neither torch nor transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..checks import (
    both_streams,
    check_count,
    check_generator,
    check_seeds,
    check_temperature,
    check_top_p,
    per_row,
    seeds_as_given,
)
from ..defaults import TEMPERATURE, TOP_P

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn: temperature, nucleus, and which random numbers.

    Values are checked and kept as Python numbers; a list, an array or a tensor of one value per row becomes a tuple.

    Args:
        temperature: 0 (greedy) or above, one for all rows or one per row.
        top_p: from 0 to 1, one for all rows or one per row. Greedy rows do not use it.
        seeds: one stream of random numbers per row: an int (`seed, seed + 1, ...`) or one per row.
        generator: Meta's stream from this generator; torch's global one if neither is given.

    Raises:
        ValueError: a value out of range, or `seeds` together with `generator`.
        TypeError: a value that is no number; bools and strings are none.

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
        check_generator(self.generator)
        checked = {
            "temperature": per_row("temperature", self.temperature, check_temperature),
            "top_p": per_row("top_p", self.top_p, check_top_p),
            "seeds": None if self.seeds is None else seeds_as_given(self.seeds),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    @property
    def greedy(self) -> bool:
        """Whether every row takes its best token, so that nothing is drawn."""
        return not any(self.temperature if isinstance(self.temperature, tuple) else (self.temperature,))

    def for_rows(self, rows: int, copies: int = 1) -> "SamplingSettings":
        """The settings of a batch: each of `rows` prompts `copies` times, the seeds spelled out.

        Temperatures and `top_p` that are equal in all rows become one number. The copies of a prompt share its seed:
        streams tell them apart by their number.

        Raises:
            ValueError: a list that is longer or shorter than the batch.

        >>> SamplingSettings([0.5, 0.0], [0.9, 0.9], seeds=7).for_rows(2, copies=2)
        SamplingSettings(temperature=(0.5, 0.5, 0.0, 0.0), top_p=0.9, seeds=(7, 7, 8, 8), generator=None)
        """
        return replace(
            self,
            temperature=_for_rows("temperature", self.temperature, rows, copies),
            top_p=_for_rows("top_p", self.top_p, rows, copies),
            seeds=None if self.seeds is None else repeat_interleave(check_seeds(self.seeds, rows), copies),
        )


def _for_rows(name: str, values: float | Sequence[float], rows: int, copies: int) -> float | Sequence[float]:
    if not isinstance(values, tuple):
        return values
    check_count(name, len(values), rows)
    return values[0] if len(set(values)) == 1 else repeat_interleave(values, copies)


def repeat_interleave(values: Sequence[Any], copies: int) -> list[Any]:
    """Each value so many times, as `num_return_sequences` repeats prompts.

    >>> repeat_interleave(["a", "b"], 2)
    ['a', 'a', 'b', 'b']
    """
    return [value for value in values for _ in range(copies)]
