"""Scores by a walk over the tree of prompts: each answer is the one that a forward of its own would give."""

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_llama_sampling.generation import walk
from hf_llama_sampling.generation.mixin import _transformers_generate
from hf_llama_sampling.generation.prefix import Text, grow
from tests.benchmarks import memory
from tests.bounds import ROUNDING
from tests.conftest import examples

pytestmark = pytest.mark.slow

FEW = st.lists(st.integers(3, 6), max_size=6)
# A beginning that texts share, and their own ends; beginnings build on each other.
TREES = st.lists(st.tuples(st.integers(0, 100), FEW), min_size=1, max_size=12)


def texts_of(tree):
    """Texts of at least two ids, many of which share beginnings."""
    texts = [[1]]
    for parent, ids in tree:
        texts.append(texts[parent % len(texts)] + ids)
    return [[*text, 7] for text in texts]


@pytest.fixture
def sharing(monkeypatch):
    """Share whatever saves a token: on a model this small nothing would be worth one more forward."""
    monkeypatch.setattr(walk, "_FORWARD_COST", {"cpu": 1})


def alone(model, ids):
    """Logprobs of a text's tokens from the second on, and whether each is the best: one forward."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0]
    targets = torch.tensor(ids[1:])
    logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return logprobs.tolist(), (logits.argmax(-1) == targets).tolist()


class Forwards:
    """The shapes of the ids that a model was given."""

    def __init__(self, model):
        self.shapes = []
        self.hook = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        """Called before each forward."""
        self.shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def tokens(self):
        """Rows times columns of all forwards."""
        return sum(rows * columns for rows, columns in self.shapes)


@given(TREES)
def test_each_shared_beginning_is_one_edge(tree):
    """The tree holds one token per distinct beginning of the inputs, none twice and none missing."""
    texts = texts_of(tree)
    root = grow([Text(np.array(ids, np.int32), 1) for ids in texts])
    edges, found = [(root, ())], set()
    for edge, before in edges:
        path = before + tuple(edge.tokens.tolist())
        here = {path[: n + 1] for n in range(len(before), len(path))}
        assert not here & found
        found |= here
        edges += [(child, path) for child in edge.children]
        assert len({int(child.tokens[0]) for child in edge.children}) == len(edge.children) != 1 or edge is root
    assert found == {tuple(ids[:n]) for ids in texts for n in range(1, len(ids))}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, **examples(50))
@given(
    tree=TREES,
    first=st.lists(st.integers(1, 8), min_size=13, max_size=13),
    chunk_bytes=st.sampled_from([1, 30_000, 200_000, 128 << 20]),
    cache_bytes=st.sampled_from([0, 20_000, 100_000, 1 << 30]),
)
def test_any_tree_under_any_budget_gives_each_texts_own_answer(
    tiny_model, sharing, tree, first, chunk_bytes, cache_bytes
):
    """Logprobs within float32 rounding of a forward per text, `is_greedy` equal, the best token first."""
    texts = texts_of(tree)
    walked = [Text(np.array(ids, np.int32), min(at, len(ids) - 1)) for ids, at in zip(texts, first, strict=False)]
    walk.score_texts(
        tiny_model,
        _transformers_generate(tiny_model),
        walked,
        rows=range(len(walked)),
        top=2,
        greedy=True,
        chunk_bytes=chunk_bytes,
        cache_bytes=cache_bytes,
    )
    for ids, text in zip(texts, walked, strict=False):
        logprobs, best = alone(tiny_model, ids)
        start = text.first - 1
        assert text.logprobs() == pytest.approx(logprobs[start:], abs=ROUNDING)
        assert text.is_greedy() == all(best[start:])
        assert [top[0][0] == token for top, token in zip(text.top(), ids[text.first :], strict=True)] == best[start:]


def multiple_choice(header, contexts, own, choices, length, seed=0):
    """Contexts with a header in common, and choices of a length for each."""
    draw = random.Random(seed)
    begin = [1] + [draw.randrange(3, 400) for _ in range(header - 1)]
    given_contexts = [begin + [10 + row] + [draw.randrange(3, 400) for _ in range(own - 1)] for row in range(contexts)]
    continuations = [
        [[20 + choice] + [draw.randrange(3, 400) for _ in range(length - 1)] for choice in range(choices)]
        for _ in range(contexts)
    ]
    return given_contexts, continuations


def test_header_and_contexts_are_read_once(tiny_model):
    """Header 100, 4 contexts of 40 more, 4 continuations of 6: each token is forwarded once, the last ones never."""
    contexts, continuations = multiple_choice(100, 4, 40, 4, 6)
    tiny_model.score_continuations(contexts, continuations)  # the trial of a first call is over
    with Forwards(tiny_model) as forwards:
        tiny_model.score_continuations(contexts, continuations)
    assert forwards.tokens == 100 + 4 * 40 + 4 * 4 * (6 - 1)


def test_continuations_of_one_token_cost_no_forward(tiny_model):
    """They are read off their context's last logits."""
    contexts, continuations = multiple_choice(100, 4, 40, 8, 1)
    tiny_model.score_continuations(contexts, continuations)
    with Forwards(tiny_model) as forwards:
        tiny_model.score_continuations(contexts, continuations)
    assert forwards.tokens == 100 + 4 * 40


def test_score_continuations_equals_a_forward_per_pair(tiny_model):
    """Totals, logprobs and `is_greedy` of every pair, greedy ones among them."""
    contexts, continuations = multiple_choice(60, 3, 30, 3, 5)
    for context, choices in zip(contexts, continuations, strict=True):
        greedy = tiny_model.generate([context], max_gen_len=5, temperature=0, eos_token_id=[]).tokens[0]
        choices += [greedy, greedy[:1], [*greedy[:4], (greedy[4] + 1) % 400]]
    out = tiny_model.score_continuations(contexts, continuations)
    for i, context in enumerate(contexts):
        assert out.is_greedy[i] == [False, False, False, True, True, False]
        for j, ids in enumerate(continuations[i]):
            logprobs, _ = alone(tiny_model, context + ids)
            expected = logprobs[len(context) - 1 :]
            assert out.logprobs[i][j] == pytest.approx(expected, abs=ROUNDING)
            assert out.totals[i][j] == pytest.approx(sum(expected), abs=len(ids) * ROUNDING)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, **examples(5))
@given(
    tree=TREES,
    ends=st.lists(st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), min_size=1, max_size=3), min_size=13),
    order=st.randoms(use_true_random=False),
    chunk_bytes=st.sampled_from([30_000, 128 << 20]),
    cache_bytes=st.sampled_from([0, 20_000, 1 << 30]),
)
def test_any_contexts_in_any_order_under_any_budget(tiny_model, sharing, tree, ends, order, chunk_bytes, cache_bytes):
    """Contexts that begin and end within one another, with continuations that are equal or begin alike."""
    contexts = texts_of(tree)
    order.shuffle(contexts)
    continuations = ends[: len(contexts)]
    out = tiny_model.score_continuations(contexts, continuations, chunk_bytes=chunk_bytes, cache_bytes=cache_bytes)
    for i, context in enumerate(contexts):
        for j, ids in enumerate(continuations[i]):
            logprobs, best = alone(tiny_model, context + ids)
            assert out.logprobs[i][j] == pytest.approx(logprobs[len(context) - 1 :], abs=ROUNDING)
            assert out.is_greedy[i][j] == all(best[len(context) - 1 :])


def test_order_and_company_change_nothing(tiny_model):
    """Shuffled, in parts, and with contexts repeated, every answer stays within float32 rounding."""
    contexts, continuations = multiple_choice(60, 4, 30, 3, 5)
    whole = tiny_model.score_continuations(contexts, continuations)
    bound = 5 * ROUNDING
    order = [2, 0, 3, 1, 0]
    shuffled = tiny_model.score_continuations([contexts[i] for i in order], [continuations[i][::-1] for i in order])
    for place, i in enumerate(order):
        assert shuffled.totals[place] == pytest.approx(whole.totals[i][::-1], abs=bound)
        assert shuffled.is_greedy[place] == whole.is_greedy[i][::-1]
        own = tiny_model.score_continuations([contexts[i]], [continuations[i]])
        assert own.totals[0] == pytest.approx(whole.totals[i], abs=bound)


def test_caches_stay_within_the_budget(tiny_model, sharing):
    """Tensors that caches hold after each layer's update, counted apart from the walk's own books."""
    contexts, continuations = multiple_choice(40, 4, 30, 6, 5)
    column, peaks = memory.column_bytes(tiny_model), []
    for budget in (150 * column, 400 * column, 2000 * column):
        with memory.counted_caches() as peak:
            tiny_model.score_continuations(contexts, continuations, cache_bytes=budget)
        peaks.append(peak[0])
        assert peak[0] <= budget
    assert peaks[0] < peaks[1] < peaks[2]


def test_an_empty_context_starts_after_bos(tiny_model):
    """With `bos` an empty context is the BOS alone; an id, or the checkpoint's own."""
    expected = tiny_model.score_continuations([[1]], [[[5, 6]]]).totals
    assert tiny_model.score_continuations([[]], [[[5, 6]]], bos=1).totals == expected
    assert tiny_model.score_continuations([[]], [[[5, 6]]], bos=True).totals == expected


@pytest.mark.parametrize(
    ("contexts", "continuations", "error", "sentence"),
    [
        ([[1], []], [[[5]], [[5]]], ValueError, "a context must hold at least one token, but context 1 is empty: pass"),
        (
            [[1]],
            [[[5], []]],
            ValueError,
            "must hold at least one token, but continuation 1 of context 0 is",
        ),
        ([[1]], [[]], ValueError, "each context needs at least one continuation, but context 0 has none"),
        ([], [], ValueError, "contexts must hold at least one context, got none"),
        ([[1], [1, 5]], [[[5]]], ValueError, "continuations must hold one list per context, got 1 for 2 contexts"),
        ([[1, 1024]], [[[5]]], ValueError, r"token ids must lie in \[0, 1024\), got 1024 at position 1 of context 0"),
        ([[1]], [[[5], [-1]]], ValueError, r"got -1 at position 0 of continuation 1 of context 0"),
        ("text", [[[5]]], TypeError, "contexts must be lists of token ids, one per context, got text"),
        (["text"], [[[5]]], TypeError, "context 0 must be a list of token ids, got text"),
        ([[1]], [["text"]], TypeError, "continuation 0 of context 0 must be a list of token ids, got text"),
        ([1, 5], [[[5]]], TypeError, r"got a list of ids: wrap a single context as \[context\]"),
        ([[1]], [[5, 6]], TypeError, r"got a list of ids: wrap a single continuation as \[continuation\]"),
        ([[1]], [5, 6], TypeError, "got a list of ids: wrap the only continuation of the only context"),
        ([[1.5]], [[[5]]], TypeError, "context 0 must be a list of token ids, got 1.5 in it"),
        ([[1]] * 2, [[[5]], [[5] * 513]], ValueError, r"continuation 0 of context 1 makes 1 \+ 513"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence(tiny_model, contexts, continuations, error, sentence):
    """Wrong nesting, text, ids outside the vocabulary and what does not fit name the context and the continuation."""
    with pytest.raises(error, match=sentence):
        tiny_model.score_continuations(contexts, continuations)


def test_a_text_may_end_one_token_beyond_the_context(tiny_model):
    """The last token is never an input: 512 inputs and a 513th token to score."""
    out = tiny_model.score_continuations([[1]], [[[5] * 512]])
    assert len(out.logprobs[0][0]) == 512


@pytest.mark.parametrize("kind", ["arrays", "tensors", "tuples", "generators"])
def test_any_listing_of_ids_will_do(tiny_model, kind):
    """NumPy arrays, tensors, tuples and generators of ids mean what lists mean."""
    wrap = {"arrays": np.array, "tensors": torch.tensor, "tuples": tuple, "generators": iter}[kind]
    expected = tiny_model.score_continuations([[1, 5], [1, 6]], [[[7, 8]], [[9, 10]]])
    out = tiny_model.score_continuations(
        (wrap([1, at]) for at in (5, 6)), iter([[wrap([7, 8])], iter([wrap([9, 10])])])
    )
    assert out.totals == expected.totals


def test_nan_is_an_error_that_names_the_place(tiny_model):
    """The context is the row; the position counts from its first token."""

    def spoil(model, args, kwargs, output):
        output.logits[kwargs["input_ids"] == 77] = float("nan")

    hook = tiny_model.register_forward_hook(spoil, with_kwargs=True)
    try:
        # All of a text's logits are asked for, so that the hook's mask has their shape.
        with pytest.raises(ValueError, match="position 3 of row 1 hold nan or inf"):
            tiny_model.score_continuations([[1], [5]], [[[8, 9, 10]], [[6, 77, 8, 9]]])
    finally:
        hook.remove()
