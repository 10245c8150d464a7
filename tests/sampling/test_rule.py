"""The rule in plain tensor operations: equal to the reference bit for bit, and to typed-out rows."""

import math

import pytest
import torch

from hf_llama_sampling.reference import reference_sample_top_p
from hf_llama_sampling.sampling import rule

LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9, 0.99, 1])
def test_a_draw_by_rank_equals_the_reference_bit_for_bit(p):
    """With `exponential_`'s values as noise: the reference's tokens, ties included, and its generator's state."""
    generator = torch.Generator().manual_seed(round(1000 * p))
    for batch, vocab in [(500, 7), (50, 300), (10, 4096), (1, 32000)]:
        for temperature in (0.1, 0.6, 1.0, 2.5):
            logits = (torch.randn(batch, vocab, generator=generator) * 3).bfloat16()  # many ties
            seed = int(torch.randint(1 << 30, (), generator=generator))
            ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
            probs = rule.softmax_with_temperature(logits, temperature)
            assert torch.equal(probs, torch.softmax(logits.float() / temperature, dim=-1))
            noise = torch.empty(batch, vocab).exponential_(generator=ours)
            draw = rule.draw_by_rank(probs, p, lambda tokens, rows, noise=noise: noise)
            assert torch.equal(draw.tokens[:, None], reference_sample_top_p(probs, p, generator=theirs))
            assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_draw_reports_its_probability_and_the_mass_of_its_nucleus():
    """[.5, .25, .125, .125] at p = .5 keeps two tokens: mass .75, and each token with its share of it."""
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    for noise, token, prob in (([1.0, 1.0, 9.0, 9.0], 1, 0.5), ([9.0, 1.0, 1.0, 1.0], 2, 0.25)):
        by_rank, by_id = torch.tensor([noise]), torch.tensor([[noise[2], noise[0], noise[1], noise[3]]])
        for draw in (
            rule.draw_by_rank(probs, 0.5, lambda tokens, rows, values=by_rank: values),
            rule.draw_by_token(probs, 0.5, lambda tokens, rows, values=by_id: values.gather(1, tokens)),
        ):
            assert draw.tokens.tolist() == [token]
            assert draw.softmax_probs.tolist() == [prob]
            assert draw.nucleus_mass.tolist() == [0.75]
            assert torch.equal(draw.probs, torch.tensor([prob]) / 0.75)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("row", "temperature", "probs"),
    [
        ([LARGEST, -LARGEST, 0.0], 0.6, [1, 0, 0]),
        ([LARGEST, LARGEST, 0.0], 0.6, [0.5, 0.5, 0]),
        ([LARGEST, LARGEST / 2, 0.0], 1e-30, [1, 0, 0]),
        ([-LARGEST, -LARGEST, -math.inf], 0.6, [0.5, 0.5, 0]),
        ([-LARGEST, -3e38, -LARGEST], 1e-3, [0, 1, 0]),
        ([1e9, 1e9, 0.0], 1e-38, [0.5, 0.5, 0]),
        ([0.0, -math.inf, -math.inf], 5e-324, [1, 0, 0]),
        ([LARGEST, 0.0, -LARGEST], 1e308, None),
    ],
)
def test_no_finite_logits_overflow(row, temperature, probs, as_tensor):
    """The largest finite logits, masks of the smallest, the coldest and the hottest temperatures."""
    given = torch.tensor([[temperature]]) if as_tensor else temperature
    found = rule.softmax_with_temperature(torch.tensor([row]), given)
    assert torch.isfinite(found).all()
    if probs is not None:
        assert found.tolist() == [probs]


@pytest.mark.parametrize("row", [[math.nan, 1.0, 0.0], [math.inf, 1.0, 0.0], [-math.inf, -math.inf, -math.inf]])
def test_a_row_without_a_distribution_shows_nan(row):
    """Its draw too, whatever the noise, and the other rows' probabilities are as without it."""
    logits = torch.tensor([row, [1.0, 2.0, 3.0]])
    for temperature in (0.5, torch.tensor([[0.5], [0.5]])):
        probs = rule.softmax_with_temperature(logits, temperature)
        assert probs[0].isnan().all()
        assert torch.equal(probs[1:], rule.softmax_with_temperature(logits[1:], 0.5))
        draw = rule.draw_by_rank(probs, 0.9, lambda tokens, rows: torch.ones(2, 3))
        assert draw.softmax_probs.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("row", "p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, 2),  # transformers keeps one
        ([0.5, 0.25, 0.125, 0.125], 0.75, 3),
        ([0.25, 0.25, 0.25, 0.25], 0.0, 1),
        ([0.25, 0.25, 0.25, 0.25], 0.25, 2),
        ([0.0, 1.0, 0.0], 0.9, 1),
        ([0.0, 1.0, 0.0], 1.0, 3),  # the mass before the zeros is 1, not more than 1
    ],
)
def test_exact_rows(row, p, kept):
    """Powers of two, so that every sum is exact: a token stays while the mass before it is at most p."""
    mask = rule.keep_mask(torch.tensor([row]), p)
    assert int(mask.sum()) == kept
    assert sorted(torch.tensor([row])[mask].tolist()) == sorted(row, reverse=True)[:kept][::-1]
