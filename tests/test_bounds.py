"""The bounds of `bounds.py` hold with room for float32, and are broken by 16 bits."""

import copy
import math

import pytest
import torch

from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.bounds import LOGITS, ROUNDING, float32_steps, rounding, step

IDS = [[1, 5, 60, 7, 81, 9, 33, 11], [1, 94, 3, 42, 50, 61, 2, 8]]


@torch.no_grad()
def logits(model, dtype):
    return copy.deepcopy(model).to(dtype)(torch.tensor(IDS)).logits


@pytest.mark.parametrize("size", [1.5, 2.0, 28.0, 32.0])
def test_a_step_is_the_distance_to_the_next_number(size):
    """As torch counts them, from below."""
    number = torch.tensor(size)
    assert float(number - torch.nextafter(number, torch.tensor(0.0))) == step(size)


def test_steps_are_counted_at_the_largest_magnitude():
    """Of numbers, nested lists and tensors; the sign says nothing."""
    assert float32_steps([[0.5, -28.0], [1.0, 2.0]], 5) == float32_steps(torch.tensor(-28.0), 5) == 5 * 2.0**-19


@pytest.mark.parametrize("name", ["tiny_model", "golden_model"])
def test_the_bound_of_a_forward(name, request):
    """Float32 logits differ from float64's by less, bfloat16's by more."""
    model = request.getfixturevalue(name)
    exact = logits(model, torch.float64)
    assert max(exact.abs().max(), exact.log_softmax(-1).abs().max()) < LOGITS
    assert (logits(model, torch.float32) - exact).abs().max() < rounding(model)
    assert (logits(model, torch.bfloat16) - exact).abs().max() > 10 * rounding(model)


@pytest.mark.parametrize("name", ["tiny_model", "golden_model"])
def test_the_bound_of_another_order(name, request):
    """A row alone differs from the same row in a batch, and one token at a time from all at once, by less."""
    model = request.getfixturevalue(name)
    whole = logits(model, torch.float32)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([row])).logits for row in IDS])
        cache, columns = None, []
        for column in range(len(IDS[0])):
            output = model(torch.tensor(IDS)[:, column : column + 1], use_cache=True, **{CACHE_NAME: cache})
            cache = output[CACHE_NAME]
            columns.append(output.logits)
    assert (alone - whole).abs().max() < rounding(model)
    assert (torch.cat(columns, dim=1) - whole).abs().max() < rounding(model)


def test_the_common_bound_is_the_bundled_models(tiny_model, golden_model):
    """And the golden model's is smaller: the golden data's own 1e-4."""
    assert rounding(tiny_model) == ROUNDING
    assert math.isclose(rounding(golden_model), 1e-4, rel_tol=0.1)


def test_the_real_weights_bound_is_a_thousandth(weights):
    """30 layers of 576: a thousandth of a nat, which is what their tests ask for."""
    assert math.isclose(rounding(weights), 1e-3, rel_tol=0.1)
