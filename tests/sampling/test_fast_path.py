"""The rule as tensor functions: equal to the reference bit for bit, and the window equal to the sort."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llama_sampling import sample_top_p
from hf_llama_sampling.reference import reference_sample_top_p
from hf_llama_sampling.sampling import fast_path, rule
from hf_llama_sampling.sampling.fast_path import RADIX, WINDOW, radix_nucleus, windowed_nucleus
from tests.bounds import relative

KINDS = ("peaked", "flat", "tied", "bfloat16", "float16")


def make_logits(kind, rows, vocab, generator):
    """(rows, vocab) float32 logits; the 16-bit kinds are full of ties, the tied ones of almost nothing else."""
    normal = torch.randn(rows, vocab, generator=generator)
    if kind == "flat":
        return normal * 0.5
    if kind == "tied":
        return torch.randint(-3, 4, (rows, vocab), generator=generator).float()
    return {"peaked": normal * 3, "bfloat16": (normal * 3).bfloat16().float(), "float16": (normal * 2).half().float()}[
        kind
    ]


def naive_sample_top_p(probs, p, generator):
    """From the sentence alone: descending, drop where the mass before exceeds p, renormalize, draw, map back."""
    values, ids = probs.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values
    values = torch.where(before > p, torch.zeros(()), values)
    values = values / values.sum(dim=-1, keepdim=True)
    return torch.stack([ids[row, rank] for row, rank in enumerate(torch.multinomial(values, 1, generator=generator))])


def exp_noise(rows, vocab, generator):
    """Noise by rank and by token, as the two contracts ask for it: a fixed table."""
    table = torch.empty(rows, vocab).exponential_(generator=generator)

    def by_rank(tokens, some):
        return (table if some is None else table[some])[:, : tokens.shape[1]]

    def by_token(tokens, some):
        return (table if some is None else table[some]).gather(1, tokens)

    return by_rank, by_token


def same_draws(one, other):
    """Equal bit for bit: tokens, their probabilities, and the mass of the nuclei."""
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("p", [0, 0.1, 0.5, 0.9, 0.99, 1])
def test_sample_top_p_equals_the_reference_bit_for_bit(p):
    """More than 100,000 rows over the six p: the same tokens as two plain formulations, the same state left behind."""
    rows = 0
    generator = torch.Generator().manual_seed(round(1000 * p))
    shapes = [(3000, 7), (300, 64), (80, 300), (40, 1024), (1, 500), (3, 32000), (1, 128256)]
    for batch, vocab in shapes:
        for kind in KINDS:
            temperature = (0.05, 0.6, 1.0, 2.5, 1e-30)[(vocab + KINDS.index(kind)) % 5]
            probs = torch.softmax(make_logits(kind, batch, vocab, generator) / temperature, dim=-1)
            seed = int(torch.randint(1 << 30, (), generator=generator))
            ours, naive, reference = (torch.Generator().manual_seed(seed) for _ in range(3))
            kept = probs.clone()
            drawn = sample_top_p(probs, p, generator=ours)
            assert torch.equal(probs, kept)
            assert torch.equal(drawn, naive_sample_top_p(probs, p, naive))
            assert torch.equal(drawn, reference_sample_top_p(probs, p, generator=reference))
            assert torch.equal(ours.get_state(), naive.get_state())
            assert torch.equal(ours.get_state(), reference.get_state())
            rows += batch
    assert rows * 6 > 100_000


@pytest.mark.parametrize("shape", [(300, 4), (9000, 3), (40000, 2)])
def test_sample_top_p_equals_the_reference_in_any_layout(shape):
    """torch sorts and draws in memory's order, so a transposed tensor has other draws, and ties in another order."""
    generator = torch.Generator().manual_seed(4)
    for seed in range(20):
        probs = torch.softmax((torch.randn(shape, generator=generator) * 2).round(), dim=0).t()
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drawn = sample_top_p(probs, 0.9, generator=ours)
        assert torch.equal(drawn, reference_sample_top_p(probs, 0.9, generator=theirs))
        assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sample_top_p_refuses_what_is_no_distribution(value):
    """As the reference's multinomial does."""
    with pytest.raises(ValueError, match="probs must be finite"):
        sample_top_p(torch.tensor([[0.5, 0.5], [value, 0.5]]), 0.9)


def test_sample_top_p_draws_from_the_global_generator():
    """Without a generator, torch's global one gives the reference's token and is left as the reference leaves it."""
    probs = torch.softmax(torch.randn(5, 300) * 3, dim=-1)
    torch.manual_seed(11)
    drawn = sample_top_p(probs, 0.9)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(drawn, reference_sample_top_p(probs, 0.9))
    assert torch.equal(state, torch.get_rng_state())
    assert drawn.shape == (5, 1)
    assert drawn.dtype == torch.long


def window_rows(generator):
    """(probs, p) over more than 100,000 rows: many at a small V, few at 128,256, around the window's width too."""
    widths = [(2, 1500), (3, 1500), (17, 1200), (128, 500), (WINDOW - 1, 200), (WINDOW, 200), (WINDOW + 1, 200)]
    for vocab, rows in [*widths, (300, 200), (1000, 60), (4096, 20), (32000, 2), (128256, 1)]:
        for kind in KINDS:
            probs = torch.softmax(make_logits(kind, rows, vocab, generator), dim=-1)
            for p in (0.0, 0.3, 0.9, 1.0):
                yield probs, p


@pytest.mark.slow
def test_window_equals_the_full_path():
    """On more than 100,000 rows: the same tokens and probabilities by rank and by token, and the same nucleus."""
    generator = torch.Generator().manual_seed(5)
    rows = 0
    for probs, p in window_rows(generator):
        by_rank, by_token = exp_noise(*probs.shape, generator)
        before = probs.clone()
        assert same_draws(fast_path.draw_by_rank(probs, p, by_rank), rule.draw_by_rank(probs, p, by_rank))
        assert same_draws(fast_path.draw_by_token(probs, p, by_token), rule.draw_by_token(probs, p, by_token))
        assert torch.equal(fast_path.keep_mask(probs, p), rule.keep_mask(probs, p))
        assert torch.equal(probs, before)
        rows += len(probs)
    assert rows > 100_000


def test_window_is_used_and_spills():
    """Peaked rows are proved complete in the window, flat ones are not: the two paths above are both taken."""
    generator = torch.Generator().manual_seed(6)
    peaked = torch.softmax(torch.randn(50, 4096, generator=generator) * 6, dim=-1)
    flat = torch.softmax(torch.randn(50, 4096, generator=generator) * 0.5, dim=-1)
    assert not windowed_nucleus(peaked, 0.9, width=WINDOW)[1].any()
    assert windowed_nucleus(flat, 0.9, width=WINDOW)[1].all()
    assert not windowed_nucleus(flat[:, :WINDOW], 0.9, width=WINDOW)[1].any()  # the window is the whole vocabulary


@pytest.mark.slow
def test_a_lone_spilled_row_is_normalized_as_in_its_batch():
    """With several threads torch sums a lone row in another order: the draw's probability must still be the batch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            logits = torch.randn(3, 60_000, generator=generator) * 9
            logits[1] *= 0.05
            probs = torch.softmax(logits, dim=-1)
            assert windowed_nucleus(probs, 0.99, width=WINDOW)[1].tolist() == [False, True, False]
            by_rank, _ = exp_noise(3, 60_000, generator)
            assert same_draws(fast_path.draw_by_rank(probs, 0.99, by_rank), rule.draw_by_rank(probs, 0.99, by_rank))
    finally:
        torch.set_num_threads(threads)


def test_noise_is_asked_for_the_nucleus_only():
    """Of peaked rows the draw asks for as many columns as the widest nucleus has: a look-ahead kept as many."""
    probs = torch.softmax(torch.randn(4, 4096, generator=torch.Generator().manual_seed(9)) * 9, dim=-1)
    widest = int(fast_path.keep_mask(probs, 0.9).sum(-1).max())
    assert widest < 32
    for sample in (fast_path.draw_by_rank, fast_path.draw_by_token):
        asked = []
        sample(probs, 0.9, lambda tokens, rows, asked=asked: asked.append(tokens.shape) or torch.ones(tokens.shape))
        assert asked == [(4, widest)]


@pytest.mark.parametrize(
    ("row", "p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, [1, 1, 0]),  # transformers keeps one
        ([0.5, 0.25, 0.125, 0.125], 0.75, [1, 1, 1, 0]),
        ([0.125, 0.125, 0.25, 0.5], 0.75, [1, 0, 1, 1]),
        ([0.25, 0.25, 0.25, 0.25], 0.0, [1, 0, 0, 0]),
        ([0.25, 0.25, 0.25, 0.25], 0.25, [1, 1, 0, 0]),
        ([0.5, 0.5], 0.4999, [1, 0]),
        ([0.0, 1.0, 0.0], 0.9, [0, 1, 0]),
        ([0.0, 1.0, 0.0], 1.0, [1, 1, 1]),  # the mass before the zeros is 1, not more than 1
        ([0.5, 0.25, 0.25], 1.0, [1, 1, 1]),
    ],
)
def test_exact_rows(row, p, kept):
    """Powers of two, so that every sum is exact: a token stays while the mass before it is at most p."""
    mask = fast_path.keep_mask(torch.tensor([row]), p)[0]
    assert mask.sum() == sum(kept)
    if sorted(row)[0] != sorted(row)[1]:
        assert mask.tolist() == [bool(keep) for keep in kept]
    drawn = {int(sample_top_p(torch.tensor([row]), p)) for _ in range(60)}
    assert drawn <= set(mask.nonzero()[:, 0].tolist()) & {token for token, prob in enumerate(row) if prob > 0}


def test_kept_probabilities_are_renormalized():
    """[.5, .25, .25] with p = .5 draws from two tokens with 2/3 and 1/3."""
    full = rule.nucleus(torch.tensor([[0.25, 0.5, 0.125, 0.125]]), 0.5)
    assert full.tokens[0, :2].tolist() == [1, 0]
    assert full.dropped.tolist() == [[False, False, True, True]]
    for noise, drawn, prob in (([1, 9, 9, 9], 1, 2 / 3), ([9, 1, 9, 9], 0, 1 / 3), ([9, 9, 1e-9, 1e-9], 1, 2 / 3)):
        draw = rule.race(full, full.probs, torch.tensor([noise]), rule.mass_of(full))
        assert draw.tokens.tolist() == [drawn]
        assert draw.nucleus_mass.tolist() == [0.75]
        assert draw.probs.tolist() == [pytest.approx(prob, rel=relative(4))]


def test_where_ties_straddle_the_edge_seeded_draws_keep_the_lower_ids():
    """Which of the equal tokens is in the nucleus must not hang on the sort: the lowest ids, at any width."""
    for vocab in (8, WINDOW * 2, 3000):
        probs = torch.full((1, vocab), 1 / vocab)
        count = math.floor(0.25 * vocab) + 1
        drawn = set()
        for seed in range(40):
            _, by_token = exp_noise(1, vocab, torch.Generator().manual_seed(seed))
            drawn.add(int(fast_path.draw_by_token(probs, 0.25, by_token).tokens))
        assert len(drawn) > 2
        assert max(drawn) <= count


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-10, 1e6, 3e38])
def test_extreme_temperatures_give_distributions(temperature):
    """No nan: the coldest is the best token alone, the hottest is uniform; as a tensor likewise."""
    logits = torch.tensor([[3.0, -2.0, 1.0, 2.999], [-300.0, 500.0, 20.0, 0.0], [1e8, 1e8 - 100, -1e8, 0.0]])
    probs = fast_path.softmax_with_temperature(logits, temperature)
    assert torch.isfinite(probs).all()
    assert (probs.sum(-1) - 1).abs().max() <= relative(8)  # four quotients and their sum
    if temperature < 1e-8:
        assert torch.equal(probs, torch.nn.functional.one_hot(logits.argmax(-1), 4).float())
    per_row = fast_path.softmax_with_temperature(logits, torch.full((3, 1), temperature))
    assert torch.equal(per_row, probs)
    assert sample_top_p(probs, 0.9).shape == (3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_setting_per_row_equals_the_rows_alone(kind):
    """Per-row temperatures and p, as tensors, are what each row gets alone with the numbers."""
    generator = torch.Generator().manual_seed(8)
    temperatures = [0.6, 1e-45, 0.1, 1.0, 2.5, 1e-30, 0.3, 1e6]
    ps = [0.9, 0.5, 0.0, 1.0, 0.99, 0.9, 0.1, 0.75]
    for vocab in (5, 700, 5000):
        logits = make_logits(kind, 8, vocab, generator)
        before = logits.clone()
        probs = fast_path.softmax_with_temperature(logits, torch.tensor(temperatures)[:, None])
        assert torch.equal(logits, before)
        p = torch.tensor(ps)[:, None]
        by_rank, by_token = exp_noise(8, vocab, generator)
        draws = fast_path.draw_by_rank(probs, p, by_rank), fast_path.draw_by_token(probs, p, by_token)
        mask = fast_path.keep_mask(probs, p)
        for row in range(8):
            alone = fast_path.softmax_with_temperature(logits[row : row + 1], temperatures[row])
            assert torch.equal(alone[0], probs[row])
            assert torch.equal(fast_path.keep_mask(alone, ps[row])[0], mask[row])
            for draw, sample, noise in zip(
                draws, (fast_path.draw_by_rank, fast_path.draw_by_token), (by_rank, by_token), strict=True
            ):
                here = torch.tensor([row])
                single = sample(alone, ps[row], lambda t, some, noise=noise, here=here: noise(t, here))
                assert single.tokens[0] == draw.tokens[row]
                assert single.probs[0] == draw.probs[row]


def test_logits_beside_others_are_not_touched_by_an_infinite_row():
    """nan or inf in one row leaves the other rows' distributions and draws alone."""
    logits = torch.randn(3, 50)
    bad = logits.clone()
    bad[1, 4] = math.nan
    for temperature in (0.6, torch.tensor([[0.6], [0.6], [0.5]])):
        good, mixed = (
            fast_path.softmax_with_temperature(logits, temperature),
            fast_path.softmax_with_temperature(bad, temperature),
        )
        assert torch.equal(good[[0, 2]], mixed[[0, 2]])
        for sample, which in ((fast_path.draw_by_rank, 0), (fast_path.draw_by_token, 1)):
            noise = exp_noise(3, 50, torch.Generator().manual_seed(1))[which]
            assert torch.equal(sample(good, 0.9, noise).tokens[[0, 2]], sample(mixed, 0.9, noise).tokens[[0, 2]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_draw_something(value):
    """Where every row is nan or infinite a draw still answers, so that the caller can name the row."""
    for shape in ((1, 5), (2, 600)):
        probs = fast_path.softmax_with_temperature(torch.full(shape, value), 0.6)
        by_rank, by_token = exp_noise(*shape, torch.Generator().manual_seed(1))
        assert fast_path.draw_by_rank(probs, 0.9, by_rank).tokens.shape == (shape[0],)
        assert fast_path.draw_by_token(probs, 0.9, by_token).tokens.shape == (shape[0],)


# What makes a proof fail is mass near the edge: equal values, denormals, one-hot rows, a window exactly full.
PIECES = st.sampled_from([0.0, 1e-45, 1e-38, 1e-20, 1e-7, 2.0**-24, 2.0**-12, 1 / 256, 1 / 257, 0.1, 0.5, 1.0])


@given(
    pieces=st.lists(st.tuples(PIECES, st.integers(1, 300)), min_size=1, max_size=5),
    p=st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 0.9, 0.999999, 1.0])),
    at_the_edge=st.booleans(),
    normalized=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_nothing_breaks_the_window(pieces, p, at_the_edge, normalized, seed):
    """Whatever the row is made of, and with p set on one of its own sums, window and sort agree bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.cat([torch.full((count,), value) for value, count in pieces])
    if not row.sum() > 0:
        row[0] = 1.0
    row = row[torch.randperm(len(row), generator=generator)]
    probs = torch.stack([row, row.roll(1), row.flip(0)])
    probs = probs / probs.sum(-1, keepdim=True) if normalized else probs
    if at_the_edge:  # p exactly the mass before some token
        ordered = probs[0].sort(descending=True).values
        before = ordered.cumsum(-1) - ordered
        p = min(1.0, float(before[int(torch.randint(len(before), (), generator=generator))]))
    by_rank, by_token = exp_noise(*probs.shape, generator)
    assert same_draws(fast_path.draw_by_rank(probs, p, by_rank), rule.draw_by_rank(probs, p, by_rank))
    assert same_draws(fast_path.draw_by_token(probs, p, by_token), rule.draw_by_token(probs, p, by_token))
    assert torch.equal(fast_path.keep_mask(probs, p), rule.keep_mask(probs, p))


@pytest.mark.parametrize("size", [RADIX // 4 - 1, RADIX // 4, RADIX - 1, RADIX, RADIX + 1, 128_256])
@pytest.mark.parametrize("kind", ["flat", "tied", "zeros"])
def test_the_radix_sort_is_the_stable_sort(size, kind):
    """All four fields equal bit for bit, around the sizes where the road changes, ties and zeros included."""
    logits = torch.randn(2, size) * {"flat": 0.5, "tied": 3.0, "zeros": 60.0}[kind]
    probs = torch.softmax(logits.bfloat16().float() if kind == "tied" else logits, dim=-1)
    for ours, theirs in zip(radix_nucleus(probs, 0.9), rule.nucleus(probs, 0.9, stable=True), strict=True):
        assert torch.equal(ours, theirs)
