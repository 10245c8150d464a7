"""Checks of numbers and choices, and the sentences of their refusals: the rule, the value, the row, the way out.

What this module does not do: it knows no tensors and no model.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

PerRow = float | Sequence[float]


class ReferenceAssertion(ValueError, AssertionError):
    """A refusal where the reference asserts, so that scripts which catch its `AssertionError` go on."""


class ReferenceTypeAssertion(TypeError, ReferenceAssertion):
    """The same where the reference asserts a type."""


def check_bool(name: str, value: Any, way_out: str = "") -> bool:
    """True or False; 0, 1, "no" and other stand-ins are refused, since a number may have been meant as one.

    Args:
        way_out: what to give instead, added to the sentence.

    >>> check_bool("echo", "no")
    Traceback (most recent call last):
    TypeError: echo must be True or False, got 'no'
    """
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # NumPy's too
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {value!r}{way_out and f': {way_out}'}")


def check_int(name: str, value: Any, *, least: int, most: int | None = None, where: str = "") -> int:
    """An int of at least `least` (and at most `most`)."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}{where}")
    if number < least or (most is not None and number > most):
        bound = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bound}, got {number}{where}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, found: int, rows: int) -> None:
    """One value per row, no more and no fewer."""
    if found != rows:
        raise ValueError(f"{name} must be one value or one per row, got {found} for {rows} rows")


def check_temperature(value: Any, where: str = "") -> float:
    """A temperature as a float: 0 or above and finite."""
    number = _number("temperature", value, where)
    if not 0 <= number < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or a finite number above it, got {value!r}{where}")
    return number


def check_top_p(value: Any, where: str = "") -> float:
    """A `top_p` as a float: from 0 to 1."""
    number = _number("top_p", value, where)
    if not 0 <= number <= 1:
        raise ValueError(
            f"top_p must lie in [0, 1], got {value!r}{where}: 1 keeps nearly all tokens, 0 the best one alone"
        )
    return number


def _number(name: str, value: Any, where: str) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, got {value!r}{where}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, got {value!r}{where}") from None


def per_row(name: str, values: Any, check: Any) -> float | list[float]:
    """A number, or a list of one per row; a list of one and the same number is that number."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        number: float = check(values)
        return number
    numbers = [check(value, f" for row {row}") for row, value in enumerate(values)]
    if not numbers:
        raise ValueError(f"{name} must be a number or one per row, got an empty list")
    return numbers


def check_seeds(seeds: int | Sequence[int], rows: int) -> list[int]:
    """One seed per row; an int means `seed, seed + 1, ...`."""
    given = seeds_as_given(seeds)
    listed = list(range(given, given + rows)) if isinstance(given, int) else given
    check_count("seeds", len(listed), rows)
    for row, seed in enumerate(listed):
        _check_seed(seed, row)
    return listed


def seeds_as_given(seeds: int | Sequence[int]) -> int | list[int]:
    """An int, or a list of them; tensors and arrays count as lists."""
    seeds = seeds.tolist() if hasattr(seeds, "tolist") else seeds
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        return _check_seed(seeds, 0)
    if not isinstance(seeds, Sequence) or isinstance(seeds, (str, bytes)):
        raise TypeError(f"seeds must be an int or one int per row, got {seeds!r}")
    return [_check_seed(seed, row) for row, seed in enumerate(seeds)]


def _check_seed(seed: Any, row: int) -> int:
    try:
        number = operator.index(seed) if not isinstance(seed, bool) else None
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"seeds must be ints, got {seed!r} for row {row}")
    if not 0 <= number < 2**64:
        raise ValueError(f"seeds must lie in [0, 2**64), got {number} for row {row}")
    return number


def first_not_none(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def to_python(value: Any) -> Any:
    """A tensor's or an array's values as Python ones; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def both_streams() -> str:
    """The refusal of two contracts at once."""
    return (
        "seeds and generator exclude each other: seeds draw one stream per row, generator is Meta's single stream; "
        "give one of the two"
    )


def nonfinite(row: int, position: int) -> ValueError:
    """The error for logits that no rule can sample or score."""
    return ValueError(
        f"the model's logits must be finite, but those for position {position} of row {row} hold nan or inf: "
        "check the weights and the dtype (float16 overflows where bfloat16 and float32 do not)"
    )
