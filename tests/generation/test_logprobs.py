"""Logprobs beside tokens: raw, of the best tokens, and under the distribution drawn from."""

import pytest
import torch

from tests.bounds import ROUNDING
from tests.generation.helpers import RAGGED, SHORT, at, close, plain_logprobs


def test_logprobs_are_of_the_raw_logits(tiny_model):
    """Prompt and completion, against one plain forward per row; temperature and nucleus do not show."""
    for schedule in ("reference", "padded"):
        for temperature in (0, 0.6, [0.0, 2.0, 0.6]):
            out = tiny_model.generate(
                RAGGED, max_gen_len=9, temperature=temperature, seeds=1, echo=True, logprobs=True, schedule=schedule
            )
            close(out.logprobs, [at(plain_logprobs(tiny_model, row), row) for row in out.tokens])
            assert all(row[0] == 0.0 for row in out.logprobs)
            without = tiny_model.generate(
                RAGGED, max_gen_len=9, temperature=temperature, seeds=1, logprobs=True, schedule=schedule
            )
            close(without.logprobs, [row[len(p) :] for row, p in zip(out.logprobs, RAGGED, strict=True)])


def test_top_logprobs(tiny_model):
    """The k best ids with their raw logprobs, best first, at every position; k up to the vocabulary."""
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, echo=True, top_logprobs=3, schedule=schedule)
        assert out.logprobs is None
        for row, best in zip(out.tokens, out.top_logprobs, strict=True):
            assert best[0] == []
            values, ids = plain_logprobs(tiny_model, row)[1:].topk(3)
            assert [[token for token, _ in place] for place in best[1:]] == ids.tolist()
            close([[value for _, value in place] for place in best[1:]], values.tolist())
    every = tiny_model.generate([SHORT], max_gen_len=1, seeds=1, top_logprobs=1024)
    assert sorted(token for token, _ in every.top_logprobs[0][0]) == list(range(1024))


def test_sampled_logprobs(tiny_model):
    """Under the renormalized nucleus after temperature, recomputed here; 0 for prompts and greedy rows."""
    temperatures, ps = [0.6, 1.5, 0.0], [0.9, 0.5, 0.9]
    out = tiny_model.generate(
        RAGGED, max_gen_len=8, temperature=temperatures, top_p=ps, seeds=1, echo=True, logprobs=True
    )
    for row, found, prompt, t, p in zip(out.tokens, out.sampled_logprobs, RAGGED, temperatures, ps, strict=True):
        assert len(found) == len(row)
        assert found[: len(prompt)] == [0.0] * len(prompt)
        if t == 0:
            assert set(found) == {0.0}
            continue
        for position in range(len(prompt), len(row)):
            probs = torch.softmax(plain_logprobs(tiny_model, row)[position].double() / t, -1)
            ordered, ids = probs.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered > p] = 0
            ordered /= ordered.sum()
            expected = float(ordered[ids == row[position]].log())
            assert found[position] == pytest.approx(expected, abs=ROUNDING / t)
