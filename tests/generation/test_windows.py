"""`score_tokens` of long texts and of spans: each token once, in its window, and nothing else."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llama_sampling.generation.windows import windows
from tests.bounds import ROUNDING
from tests.generation.helpers import BOS, RAGGED, at, close, plain_logprobs

pytestmark = pytest.mark.slow

LONG = random.Random(5).sample(range(3, 1024), 64)


def by_hand(model, text, size, stride):
    """Logprobs of a text's tokens from the second on: for each token a forward over what its window holds before it."""
    found = []
    for position in range(1, len(text)):
        begin = 0
        while position >= begin + size:
            begin += stride
        with torch.no_grad():
            logits = model(torch.tensor([text[begin:position]])).logits[0, -1]
        found.append(logits.double().log_softmax(-1)[text[position]].item())
    return found


def count_head_rows(model):
    """A list that gets the rows of each use of the head, and the hook that fills it."""
    rows = []
    head = model.get_output_embeddings()
    return rows, head.register_forward_hook(lambda _, given, out: rows.append(math.prod(given[0].shape[:-1])))


@given(length=st.integers(1, 40), size=st.integers(2, 12), stride=st.integers(1, 11), start=st.integers(1, 41))
def test_windows_score_each_position_once(length, size, stride, start):
    """From `start` on, in order, with at least `size - stride` tokens before each, and one at least."""
    stride = min(stride, size - 1)
    cut = list(windows(length, size, stride, start))
    assert [place for part in cut for place in range(part.first, part.end)] == list(range(start, length))
    for part in cut:
        assert part.end - part.begin <= size and part.end <= length
        assert part.begin % stride == 0 and part.begin < part.first
        assert part.begin == 0 or part.first - part.begin >= size - stride


@pytest.mark.parametrize(("size", "stride"), [(16, 8), (16, 15), (9, 1), (40, 30)])
def test_long_texts_equal_a_forward_per_token(tiny_model, size, stride):
    """With and without BOS, in one call with texts that fit; totals and counts are of the scored tokens."""
    texts = [LONG, LONG[:size], LONG[:5], LONG[:1]]
    for bos in (None, BOS):
        scored = tiny_model.score_tokens(texts, max_seq_len=size, stride=stride, bos=bos)
        for row, text in enumerate(texts):
            expected = by_hand(tiny_model, text if bos is None else [bos, *text], size, stride)
            assert scored.counts[row] == len(expected) == len(text) - (bos is None)
            close([scored.logprobs[row]], [[0.0, *expected] if bos is None else expected])
            assert scored.totals[row] == pytest.approx(sum(expected), abs=ROUNDING * len(text))


@pytest.mark.filterwarnings("ignore")  # the harness' own imports warn
def test_windows_are_those_of_the_harness(tiny_model):
    """Its rolling windows of `max_length` n: a size of n + 1, a stride of n, its prefix token as BOS.

    The lengths are multiples of n: a last window that is not full gets more context there.
    """
    utils = pytest.importorskip("lm_eval.utils", reason="needs lm_eval: install the extra lm-eval")
    for max_length in (8, 16, 64):
        total = 0.0
        for window in utils.get_rolling_token_windows(LONG, BOS, max_length, 1):
            context, continuation = utils.make_disjoint_window(window)
            total += tiny_model.score_continuations([context], [[continuation]]).totals[0][0]
        scored = tiny_model.score_tokens([LONG], max_seq_len=max_length + 1, stride=max_length, bos=True)
        assert scored.counts == [len(LONG)]
        assert scored.totals[0] == pytest.approx(total, abs=ROUNDING * len(LONG))


def test_a_text_longer_than_the_model_is_scored(tiny_model):
    """The model's own context is the window where `max_seq_len` is not given, and its last place is used."""
    text = [BOS, *(3 + place % 900 for place in range(599))]
    scored = tiny_model.score_tokens([text], stride=256)
    assert scored.counts == [599]
    close([scored.logprobs[0][:512]], tiny_model.score_tokens([text[:512]]).logprobs)
    close([scored.logprobs[0][512:]], [tiny_model.score_tokens([text[256:]]).logprobs[0][256:]])


def test_bos_before_texts_is_a_token_before_them(tiny_model):
    """The same scores as of the texts with it, without its own; True is the checkpoint's."""
    bare = [row[1:] for row in RAGGED]
    expected = tiny_model.score_tokens([[BOS, *row] for row in bare], top_logprobs=2)
    for bos in (BOS, True):
        scored = tiny_model.score_tokens(bare, top_logprobs=2, bos=bos)
        close(scored.logprobs, [row[1:] for row in expected.logprobs])
        assert [len(row) for row in scored.top_logprobs] == scored.counts == [len(row) for row in bare]
        assert all(best for row in scored.top_logprobs for best in row)
    plain = tiny_model.score_tokens(bare, bos=None)
    assert [row[0] for row in plain.logprobs] == [0.0] * len(bare)
    assert plain.counts == [len(row) - 1 for row in bare]


def test_start_cuts_the_answer(tiny_model):
    """One for all rows or one per row, with windows and BOS: what a whole call gives from there on."""
    longest = max(map(len, RAGGED))
    for more in ({}, {"bos": True}, {"max_seq_len": longest - 1, "stride": 1, "bos": True}):
        whole = tiny_model.score_tokens(RAGGED, top_logprobs=1, **more)
        for start in (0, 1, 2, [0, 1, 2], [len(row) for row in RAGGED]):
            starts = start if isinstance(start, list) else [start] * len(RAGGED)
            scored = tiny_model.score_tokens(RAGGED, top_logprobs=1, start=start, **more)
            close(scored.logprobs, [row[at:] for row, at in zip(whole.logprobs, starts, strict=True)])
            assert [len(row) for row in scored.top_logprobs] == [len(row) for row in scored.logprobs]
            firsts = [at if more else max(1, at) for at in starts]
            assert scored.counts == [len(row) - first for row, first in zip(RAGGED, firsts, strict=True)]


def test_a_span_costs_its_own_logits_alone(tiny_model):
    """Rows of the head's input in all forwards: as many as tokens were asked for, under any starts and budgets."""
    texts = [[BOS, 10 + row, *LONG[: 30 + row]] for row in range(4)]
    expected = [at(plain_logprobs(tiny_model, text), text) for text in texts]
    tiny_model.score_tokens(texts)  # the trial of a first call is over
    rows, hook = count_head_rows(tiny_model)
    with hook:
        for starts in ([3, 20, 28, 5], [32, 33, 34, 35], [1, 33, 1, 35]):
            for chunk_bytes in (1, 1 << 20, 128 << 20):
                rows.clear()
                scored = tiny_model.score_tokens(texts, start=starts, chunk_bytes=chunk_bytes)
                # A forward in which nothing is read asks for one row's logits: without any, no loop goes on.
                assert sum(count for count in rows if count > 1) <= sum(scored.counts)
                close(scored.logprobs, [row[at:] for row, at in zip(expected, starts, strict=True)])
        rows.clear()
        scored = tiny_model.score_tokens([LONG], max_seq_len=16, stride=8, start=40)
        assert sum(rows) == sum(scored.counts) == 24


def test_nothing_asked_for_costs_nothing(tiny_model):
    """A start at the text's end: no forward."""
    forwards = []
    with tiny_model.register_forward_hook(lambda *_: forwards.append(1)):
        scored = tiny_model.score_tokens([LONG, LONG[:3]], start=[64, 3])
    assert (scored.logprobs, scored.totals, scored.counts, forwards) == ([[], []], [0.0, 0.0], [0, 0], [])


def test_bad_logits_in_a_window_are_named_by_their_place_in_the_text(tiny_model):
    """The position counts from the text's own beginning, whatever the window and the BOS."""
    spoilt = LONG[40]

    def spoil(_, args, kwargs, out):
        out.logits[kwargs["input_ids"] == spoilt] = torch.nan  # every column of these windows is read

    with tiny_model.register_forward_hook(spoil, with_kwargs=True):
        for bos in (None, True):
            with pytest.raises(ValueError, match="for position 41 of row 1 hold nan"):
                tiny_model.score_tokens([LONG[:9], LONG], max_seq_len=16, stride=15, bos=bos)
