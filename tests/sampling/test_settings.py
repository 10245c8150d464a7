"""SamplingSettings: what it takes, what it refuses, and what a batch gets."""

import copy
import math
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_llama_sampling.sampling.settings import SamplingSettings


@pytest.mark.parametrize(
    "half",
    [
        0.5,
        np.float64(0.5),
        np.float16(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor(0.5, requires_grad=True),
        Fraction(1, 2),
        Decimal("0.5"),
    ],
)
def test_numbers_of_any_kind_count_as_numbers(half):
    """One number for all rows, kept as Python's float."""
    settings = SamplingSettings(half, half)
    assert settings == SamplingSettings(0.5, 0.5)
    assert type(settings.temperature) is float


@pytest.mark.parametrize(
    "kind",
    [list, tuple, np.array, torch.tensor, iter, lambda values: dict(enumerate(values)).values()],
)
def test_one_number_per_row_in_any_order_keeping_container(kind):
    """Lists, arrays, tensors, generators, dict values."""
    settings = SamplingSettings(kind([0.5, 0.25]), kind([1.0, 0.0]), seeds=kind([3, 4]))
    assert settings == SamplingSettings((0.5, 0.25), (1.0, 0.0), seeds=(3, 4))


NUMBERS_REFUSED = [
    True,
    np.True_,
    torch.tensor(True),
    "0.5",
    b"1",
    np.array("0.5"),
    {0: 0.5},
    {0.5},
    1j,
    [0.5, True],
    [0.5, "1"],
    torch.tensor([True, False]),
    [[0.5], [0.5]],
]


@pytest.mark.parametrize("value", NUMBERS_REFUSED)
@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_what_is_no_number_is_refused(name, value):
    """Bools and strings could be read as numbers, and are none; sets have no order."""
    with pytest.raises(TypeError, match=f"{name} must be a number, got"):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), "7", 1.0, np.float64(1), {1}, [1, True], [1, 2.0], torch.tensor([1.0])],
)
def test_what_is_no_seed_is_refused(value):
    """Seeds are ints: a float or a bool is none."""
    with pytest.raises(TypeError, match="seeds must be"):
        SamplingSettings(seeds=value)


@pytest.mark.parametrize("seed", [7, np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)])
def test_ints_of_any_kind_count_as_seeds(seed):
    """Kept as Python's int; a list of them is one seed per row."""
    assert SamplingSettings(seeds=seed) == SamplingSettings(seeds=7)
    assert SamplingSettings(seeds=[seed, seed]).seeds == (7, 7)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"temperature": -1}, ValueError, r"temperature must be 0 \(greedy\) or a finite number above it, got -1"),
        ({"temperature": [1, math.nan]}, ValueError, "temperature must be .*, got nan for row 1"),
        ({"top_p": 1.5}, ValueError, r"top_p must lie in \[0, 1\], got 1.5"),
        ({"top_p": []}, ValueError, "top_p must be a number or one per row, got an empty list"),
        ({"seeds": 2**64}, ValueError, r"seeds must lie in \[0, 2\*\*64\), got 18446744073709551616"),
        ({"seeds": [0, -1]}, ValueError, "seeds must lie .*, got -1 for row 1"),
        ({"seeds": 1, "generator": torch.Generator()}, ValueError, "seeds and generator exclude each other"),
        ({"generator": 42}, TypeError, r"generator must be a torch.Generator, got 42: .*, or seeds="),
    ],
)
def test_values_out_of_range_are_refused(kwargs, error, message):
    """The rule, the value, the row."""
    with pytest.raises(error, match=message):
        SamplingSettings(**kwargs)


def test_a_batch_gets_one_value_per_row():
    """Copies stand next to their prompt and share its seed; equal values become one number."""
    settings = SamplingSettings([0.5, 0.0], [0.9, 0.9], seeds=7).for_rows(2, copies=3)
    assert settings.temperature == (0.5, 0.5, 0.5, 0.0, 0.0, 0.0)
    assert settings.top_p == 0.9
    assert settings.seeds == (7, 7, 7, 8, 8, 8)
    assert settings.for_rows(6) == settings
    for name, value in {"temperature": [1, 1, 1], "top_p": [1, 1, 1], "seeds": [1, 2, 3]}.items():
        with pytest.raises(ValueError, match=f"{name} must be one value or one per row, got 3 for 2 rows"):
            SamplingSettings(**{name: value}).for_rows(2)
    with pytest.raises(ValueError, match=r"seeds must lie .* for row 1"):
        SamplingSettings(seeds=2**64 - 1).for_rows(2)


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), ([0, 0], True), ([0, 1], False), (1e-40, False)])
def test_greedy_means_that_no_row_draws(temperature, greedy):
    """Temperature 0 in all rows; the coldest temperature above it still draws among equal logits."""
    assert SamplingSettings(temperature).greedy is greedy


def test_settings_are_one_value():
    """Frozen, equal by value, hashable, copied and pickled."""
    settings = SamplingSettings([0.5, 0.6], seeds=3)
    with pytest.raises(AttributeError):
        settings.temperature = 1.0
    for same in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), SamplingSettings([0.5, 0.6], seeds=3)):
        assert same == settings
        assert hash(same) == hash(settings)
