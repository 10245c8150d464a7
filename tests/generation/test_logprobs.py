"""Logprobs beside tokens: raw, of the best tokens, and under the distribution drawn from."""

import math

import pytest
import torch

from hf_llama_sampling.generation.scoring import ranks
from tests.bounds import ROUNDING
from tests.generation.helpers import BOS, LONG, RAGGED, SHORT, at, close, plain_logprobs

pytestmark = pytest.mark.slow


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


def test_ranks_count_from_the_most_probable_and_ties_go_to_lower_ids():
    """Against a sort in plain Python, on logits with many ties and with -inf, in any shape."""
    logits = torch.randint(0, 5, (2, 3, 40), generator=torch.Generator().manual_seed(1)).float()
    logits[0, 0, :7] = -torch.inf
    ids = torch.randint(0, 40, (2, 3, 6), generator=torch.Generator().manual_seed(2))
    for row, wanted, found in zip(
        logits.view(-1, 40).tolist(), ids.view(-1, 6).tolist(), ranks(logits, ids).view(-1, 6).tolist(), strict=True
    ):
        order = sorted(range(40), key=lambda token: (-row[token], token))
        assert found == [order.index(token) + 1 for token in wanted]


def holds_named(found, wanted, expected, scored):
    """Whether a row's named logprobs are those of `expected` (T, V), with ranks that its rounding allows."""
    for position, (place, logprobs, counts) in enumerate(zip(found, expected, scored, strict=True)):
        assert [token for token, _, _ in place] == (wanted if counts else []), position
        for token, value, rank in place:
            assert value == pytest.approx(float(logprobs[token]), abs=ROUNDING)
            surely_before = int((logprobs > logprobs[token] + 2 * ROUNDING).sum())
            maybe_before = int((logprobs >= logprobs[token] - 2 * ROUNDING).sum())
            assert surely_before < rank <= maybe_before


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("wanted", [[5, 989, 5], [[989], [7, 3, 1000], []]], ids=["for all", "per row"])
def test_logprobs_of(tiny_model, wanted, schedule):
    """Named ids with logprobs and ranks at every position but a row's first, with echo and without, and as scores."""
    lists = wanted if isinstance(wanted[0], list) else [wanted] * 3
    for more in ({}, {"chunk_bytes": 1}, {"share_prefix": True}):
        out = tiny_model.generate(
            RAGGED, max_gen_len=6, seeds=1, echo=True, logprobs_of=wanted, schedule=schedule, **more
        )
        assert out.logprobs is None and out.top_logprobs is None
        for row, found, ids in zip(out.tokens, out.logprobs_of, lists, strict=True):
            holds_named(found, ids, plain_logprobs(tiny_model, row), [False] + [True] * (len(row) - 1))
    bare = tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, logprobs_of=wanted, schedule=schedule)
    assert [[len(place) for place in row] for row in bare.logprobs_of] == [
        [len(ids)] * len(row) for row, ids in zip(bare.tokens, lists, strict=True)
    ]
    assert bare.tokens == tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, schedule=schedule).tokens


def test_named_ids_of_rows_that_share_their_prompts(tiny_model):
    """Equal prompts with other ids, copies of a prompt, a common beginning: each row's own ids."""
    header = [BOS, *range(30, 170)]
    prompts = [[*header, 5], [*header, 5], [*header, 6, 7], [*header, 5]]
    wanted = [[5], [6, 8], [989], [5]]
    for share in (True, None, False):
        out = tiny_model.generate(
            prompts, max_gen_len=2, temperature=0, echo=True, logprobs_of=wanted, share_prefix=share
        )
        for row, found, ids in zip(out.tokens, out.logprobs_of, wanted, strict=True):
            holds_named(found, ids, plain_logprobs(tiny_model, row), [False] + [True] * (len(row) - 1))
    copies = tiny_model.generate([SHORT, LONG], max_gen_len=2, seeds=1, logprobs_of=[[5], [6]], num_return_sequences=2)
    assert [row[0][0][0] for row in copies.logprobs_of] == [5, 5, 6, 6]


def test_named_ids_of_given_texts(tiny_model):
    """`score_tokens`: texts that share beginnings name other ids; spans, windows and a BOS; any budget."""
    texts = [[*LONG, 20, 21], [*LONG, 20, 22, 23], LONG, [*LONG, 20, 21], [BOS]]
    wanted = [[5, 9], [6], [7, 989, 5], [], [5]]
    for chunk_bytes in (1, 1 << 20):
        scored = tiny_model.score_tokens(texts, logprobs_of=wanted, chunk_bytes=chunk_bytes)
        for text, found, ids in zip(texts, scored.logprobs_of, wanted, strict=True):
            holds_named(found, ids, plain_logprobs(tiny_model, text), [False] + [True] * (len(text) - 1))
    span = tiny_model.score_tokens(texts[:2], logprobs_of=[5], start=[3, 8], bos=True, max_seq_len=8, stride=7)
    assert [[place[0][0] for place in row] for row in span.logprobs_of] == [[5] * 6, [5] * 2]
    assert tiny_model.score_tokens(texts).logprobs_of is None


@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("seeds", [None, 1], ids=["meta", "seeds"])
def test_the_three_distributions(tiny_model, schedule, seeds):
    """Raw, after temperature and after the nucleus, and its mass, from a plain forward; greedy is certain."""
    temperatures, ps = [0.6, 1.7, 0.0], [0.9, 0.5, 0.9]
    torch.manual_seed(3)
    out = tiny_model.generate(
        RAGGED,
        max_gen_len=8,
        temperature=temperatures,
        top_p=ps,
        seeds=seeds,
        echo=True,
        sampling_logprobs=True,
        schedule=schedule,
    )
    for index, (row, prompt, t, p) in enumerate(zip(out.tokens, RAGGED, temperatures, ps, strict=True)):
        found = [getattr(out, name)[index] for name in ("temperature_logprobs", "sampled_logprobs", "nucleus_mass")]
        certain = len(row) if t == 0 else len(prompt)
        assert [values[:certain] for values in found] == [[0.0] * certain, [0.0] * certain, [1.0] * certain]
        raw = plain_logprobs(tiny_model, row)
        close([out.logprobs[index]], [at(raw, row)])
        for position in range(certain, len(row)):
            scaled = (raw[position].double() / t).log_softmax(-1)
            ordered = scaled.exp().sort(descending=True).values
            mass = float(ordered[ordered.cumsum(-1) - ordered <= p].sum())
            expected = [float(scaled[row[position]]), float(scaled[row[position]]) - math.log(mass), mass]
            assert [values[position] for values in found] == pytest.approx(expected, abs=2 * ROUNDING / t)
    plain = tiny_model.generate(RAGGED, max_gen_len=2, seeds=1, logprobs=True)
    assert plain.temperature_logprobs is None and plain.nucleus_mass is None
