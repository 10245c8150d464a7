"""Properties of the rule that hold for any logits, any temperature and any top_p."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llama_sampling import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper
from hf_llama_sampling.sampling import fast_path, rule
from hf_llama_sampling.sampling.sampler import TokenSampler
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.sampling.streams import MetaStream, PromptStreams

LARGEST = torch.finfo(torch.float32).max
KINDS = {
    "normal": lambda draw, shape: torch.randn(shape, generator=draw) * 3,
    "peaked": lambda draw, shape: torch.randn(shape, generator=draw) * 30,
    "flat": lambda draw, shape: torch.randn(shape, generator=draw) * 1e-3,
    "all equal": lambda draw, shape: torch.zeros(shape),
    "ties": lambda draw, shape: torch.randint(-3, 4, shape, generator=draw).float(),
    "bfloat16": lambda draw, shape: (torch.randn(shape, generator=draw) * 3).bfloat16(),
    "float16": lambda draw, shape: (torch.randn(shape, generator=draw) * 3).half(),
    "float64": lambda draw, shape: torch.randn(shape, generator=draw, dtype=torch.float64) * 3,
    "denormal": lambda draw, shape: torch.randn(shape, generator=draw) * 1e-40,
    "huge": lambda draw, shape: torch.randn(shape, generator=draw).clamp(-2, 2) * (LARGEST / 2),
    "masked": lambda draw, shape: torch.randn(shape, generator=draw).masked_fill(
        torch.rand(shape, generator=draw) < 0.9, -LARGEST
    ),
}


@st.composite
def batches(draw):
    """Logits (B, V) of any kind, some of them -inf, at least one of each row finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([255, 256, 257, 600, 9000])))
    rows = draw(st.integers(1, 4 if vocab < 1000 else 2))
    kinds = [draw(st.sampled_from(sorted(KINDS))) for _ in range(rows)]
    if draw(st.booleans()):
        kinds = kinds[:1] * rows
    logits = torch.cat([KINDS[kind](generator, (1, vocab)) for kind in kinds])
    if draw(st.booleans()):
        hidden = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.1, 0.9, 1.0]))
        shown = torch.randint(vocab, (rows, 1), generator=generator)
        logits = logits.masked_fill(hidden.scatter(1, shown, False), -math.inf)
    return logits


TEMPERATURES = st.one_of(
    st.floats(0.05, 5), st.floats(0, 1e300), st.sampled_from([0.0, 5e-324, 1e-38, 1e-30, 0.6, 1.0, 2.0, 1e6, 1e308])
)
TOP_PS = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]))
SEEDS = st.integers(0, 2**64 - 1)


def kept_in_plain_python(probs, top_p):
    """The nucleus' probabilities by the sentence alone: descending, drop where the float32 mass before exceeds p."""
    ordered = probs.sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    p = torch.tensor(top_p, dtype=torch.float32)
    return [
        [prob for prob, mass in zip(*pair, strict=True) if not mass > p] for pair in zip(ordered, before, strict=True)
    ]


def warped(logits, temperature, top_p):
    """Scores after both warpers, as transformers' loop would have them."""
    return LlamaTopPLogitsWarper(top_p)(None, LlamaTemperatureLogitsWarper(temperature)(None, logits))


def ids_for(logits):
    """Texts of three tokens."""
    return torch.ones(len(logits), 3, dtype=torch.long)


@pytest.mark.slow
@given(batches(), TEMPERATURES, TOP_PS)
def test_the_kept_set_is_the_rules_and_never_empty(logits, temperature, top_p):
    """Through the warpers, on CPU and by the rule on any device; the input stays as it was."""
    before = logits.clone()
    scores = warped(logits, temperature, top_p)
    assert torch.equal(logits, before)
    assert not scores.isnan().any()
    assert scores.shape == logits.shape
    kept = scores > -math.inf
    assert kept.any(-1).all()
    probs = torch.softmax(LlamaTemperatureLogitsWarper(temperature)(None, logits), dim=-1)
    expected = kept_in_plain_python(probs, top_p)
    for row, values in enumerate(expected):
        # A kept token of probability 0 may have the score -inf already.
        found = probs[row][kept[row]].tolist()
        positive = sorted(float(value) for value in values if value > 0)
        assert sorted(prob for prob in found if prob > 0) == positive
    if temperature > 0:
        assert torch.equal(probs, rule.softmax_with_temperature(logits, temperature))
        assert torch.equal(fast_path.keep_mask(probs, top_p), rule.keep_mask(probs, top_p))


@given(batches(), TEMPERATURES, TOP_PS, SEEDS)
def test_a_draw_is_a_token_that_the_warpers_keep(logits, temperature, top_p, seed):
    """Warper and sampler agree, under both contracts; the answer is one-hot, the input as it was."""
    before, allowed = logits.clone(), warped(logits, temperature, top_p) > -math.inf
    generator = torch.Generator().manual_seed(seed % 2**63)
    for sampler in (
        LlamaSampler(temperature, top_p, generator=generator),
        LlamaSampler(temperature, top_p, seeds=[seed] * len(logits)),
    ):
        answer = sampler(ids_for(logits), logits)
        assert torch.equal(logits, before)
        assert answer.dtype == torch.float32
        assert ((answer == 0).sum(-1) == 1).all()
        assert ((answer == -math.inf).sum(-1) == answer.shape[1] - 1).all()
        drawn = answer.argmax(-1, keepdim=True)
        probs = torch.softmax(LlamaTemperatureLogitsWarper(temperature)(None, logits), dim=-1)
        # The contracts may keep others of equal tokens at the edge, so compare by probability.
        least = torch.where(allowed & (probs > 0), probs, torch.inf).amin(-1, keepdim=True)
        assert (probs.gather(1, drawn) >= least).all()


@given(batches(), st.data(), SEEDS)
def test_a_batch_equals_its_rows(logits, data, seed):
    """Tokens and probabilities of each row, with settings and seeds of its own, are what it gets alone."""
    rows = len(logits)
    temperatures, ps = ([data.draw(values) for _ in range(rows)] for values in (TEMPERATURES, TOP_PS))
    seeds, here = [(seed + row) % 2**64 for row in range(rows)], torch.device("cpu")
    stream = PromptStreams(seeds, [0] * rows, [0] * rows)
    batch = TokenSampler(SamplingSettings(temperatures, ps), stream, rows=rows, device=here)(logits.float(), 5)
    for row in range(rows):
        settings, stream = SamplingSettings(temperatures[row], ps[row]), PromptStreams([seeds[row]], [0], [0])
        alone = TokenSampler(settings, stream, rows=1, device=here)(logits[row : row + 1].float(), 5)
        assert alone.tokens[0] == batch.tokens[row]
        assert alone.softmax_probs[0] == batch.softmax_probs[row]
        assert alone.probs[0] == batch.probs[row]


@given(batches(), TEMPERATURES, TOP_PS, SEEDS)
def test_the_cpu_path_equals_the_rule(logits, temperature, top_p, seed):
    """Tokens, probabilities and masses, bit for bit, under both contracts."""
    rows, probs = len(logits), fast_path.softmax_with_temperature(logits, temperature)
    streams = (
        lambda: MetaStream(torch.Generator().manual_seed(seed % 2**63)),
        lambda: PromptStreams([seed] * rows, list(range(rows)), [0] * rows),
    )
    for stream, name in zip(streams, ("draw_by_rank", "draw_by_token"), strict=True):
        one, other = (
            getattr(path, name)(probs, top_p, stream().step(probs.shape, probs.device, 7)) for path in (fast_path, rule)
        )
        assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))
