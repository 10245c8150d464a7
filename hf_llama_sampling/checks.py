"""Checks of numbers and choices, and the sentences of their refusals: the rule, the value, the row, the way out.

What this module does not do: it knows no tensors and no model.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

PerRow = float | Sequence[float]


class ReferenceAssertion(ValueError, AssertionError):
    """A refusal where the reference asserts, so that scripts which catch its `AssertionError` go on."""


class ReferenceTypeError(TypeError, ReferenceAssertion):
    """The same where the reference asserts a type."""


class ReferenceFileNotFoundError(FileNotFoundError, ReferenceAssertion):
    """The same where the reference asserts that a file is there."""


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
    """An int of at least `least` (and at most `most`); NumPy's ints and tensors of one int count as ints."""
    number = _index(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}{where}")
    if number < least or (most is not None and number > most):
        bound = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {bound}, got {number}{where}")
    return number


def _index(value: Any) -> int | None:
    """The int that `value` is, or None: a bool is none, nor is a float, whole or not."""
    value = to_scalar(value)
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str) or value not in choices:
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
    number = to_scalar(value)
    if isinstance(number, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, got {value!r}{where}")
    try:
        return float(number)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be a number, got {value!r}{where}") from None


def per_row(name: str, values: Any, check: Callable[..., float]) -> float | list[float]:
    """One number for all rows, or a list of one per row, each of them checked by `check`."""
    listed = to_list(values)
    if listed is None:
        return check(values)
    if not listed:
        raise ValueError(f"{name} must be a number or one per row, got an empty list")
    return [check(value, f" for row {row}") for row, value in enumerate(listed)]


def check_seeds(seeds: Any, rows: int) -> list[int]:
    """One seed per row; an int means `seed, seed + 1, ...`."""
    given = seeds_as_given(seeds)
    listed = list(range(given, given + rows)) if isinstance(given, int) else given
    check_count("seeds", len(listed), rows)
    for row, seed in enumerate(listed):
        _check_seed(seed, row)
    return listed


def seeds_as_given(seeds: Any) -> int | list[int]:
    """An int, or a list of them, each in range."""
    listed = to_list(seeds)
    if listed is not None:
        return [_check_seed(seed, row) for row, seed in enumerate(listed)]
    if _index(seeds) is None:
        raise TypeError(f"seeds must be an int or one int per row, got {seeds!r}")
    return _check_seed(seeds)


def _check_seed(seed: Any, row: int | None = None) -> int:
    number, where = _index(seed), "" if row is None else f" for row {row}"
    if number is None:
        raise TypeError(f"seeds must be ints, got {seed!r}{where}")
    if not 0 <= number < 2**64:
        raise ValueError(f"seeds must lie in [0, 2**64), got {number}{where}")
    return number


def check_generator(generator: Any, device: Any = None) -> None:
    """A `torch.Generator` or None; where a device is given, one of the same kind of device."""
    if generator is None:
        return
    if not (hasattr(generator, "initial_seed") and hasattr(generator, "device")):
        raise TypeError(
            f"generator must be a torch.Generator, got {generator!r}: pass torch.Generator(device).manual_seed(...), "
            "or seeds= for one stream per prompt"
        )
    if device is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator must live on the model's device {device}, got one on {generator.device}: make it with "
            f"torch.Generator({device.type!r})"
        )


def first_not_none(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def to_python(value: Any) -> Any:
    """A tensor's or an array's values as Python ones; anything else as it is."""
    value = value.detach() if hasattr(value, "detach") else value
    return value.tolist() if hasattr(value, "tolist") else value


def to_scalar(value: Any) -> Any:
    """The element of a NumPy scalar, or of a tensor or an array of one element; anything else as it is."""
    value = value.detach() if hasattr(value, "detach") else value
    try:
        return value.item()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return value


def to_list(values: Any) -> list[Any] | None:
    """The elements of a list, an array, a tensor or any other ordered iterable; None for a single value.

    >>> to_list(range(3)), to_list(0.5), to_list("abc")
    ([0, 1, 2], None, None)
    """
    values = to_python(values)
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        return None
    return list(values)


def both_streams() -> str:
    """The refusal of two contracts at once."""
    return (
        "seeds and generator exclude each other: seeds draw one stream per row, generator is Meta's single stream; "
        "give one of the two"
    )


def nothing_left(row: int, position: int, edits: str, *, known: bool) -> ValueError:
    """The error for logits that leave no token after they were edited, or nan; `known`: the model's own were sound."""
    way_out = "allow a token there" if known else "allow a token there, or check the weights and the dtype"
    return ValueError(
        f"what edits logits must leave at least one token and no nan, but {edits} leaves none for position {position} "
        f"of row {row}, or nan: {way_out}"
    )


def nonfinite(row: int, position: int) -> ValueError:
    """The error for logits that no rule can sample or score."""
    return ValueError(
        f"the model's logits must be finite, but those for position {position} of row {row} hold nan or inf: "
        "check the weights and the dtype (float16 overflows where bfloat16 and float32 do not)"
    )


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what git leaves in the place of a large one without git lfs."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).startswith(b"version https://git-lfs")
