"""The rule in plain transformers: two warpers and a sampler, on models that know nothing of this package."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from scipy import stats
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from hf_llama_sampling import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper, sample_top_p
from hf_llama_sampling.sampling.sampler import TokenSampler, one_hot
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.sampling.streams import PromptStreams
from tests.bounds import float32_steps, relative
from tests.sampling.helpers import kept_tokens

PLAIN = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
PROMPT = [1, 40, 41]


@pytest.fixture(scope="module")
def plain_model(tiny_model, tmp_path_factory):
    """The bundled model as transformers' own class."""
    path = tmp_path_factory.mktemp("plain")
    tiny_model.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert type(model) is transformers.LlamaForCausalLM
    return model


def warpers(temperature=0.6, top_p=0.9):
    """Both, in Meta's order."""
    return LogitsProcessorList([LlamaTemperatureLogitsWarper(temperature), LlamaTopPLogitsWarper(top_p)])


def scores_of(row):
    """Scores whose softmax is exactly the row's powers of two (or as near as float32 comes)."""
    return torch.tensor([row]).log()


@pytest.mark.parametrize(
    ("row", "p", "kept"),
    [
        ([0.5, 0.25, 0.25], 0.5, [0, 1]),  # transformers keeps one
        ([0.3, 0.1, 0.1, 0.5], 0.8, [0, 1, 3]),  # transformers keeps two
        ([0.5, 0.25, 0.25], 0.0, [0]),
        ([0.5, 0.25, 0.125, 0.125], 0.5, [0, 1]),
    ],
)
def test_exact_rows(row, p, kept):
    """The nucleus of typed-out rows; which of two equal tokens is kept does not matter here."""
    scores = scores_of(row)
    warped = LlamaTopPLogitsWarper(p)(None, scores)
    found = (warped > -math.inf).nonzero()[:, 1].tolist()
    assert len(found) == len(kept)
    assert sorted(row[token] for token in found) == sorted(row[token] for token in kept)
    assert torch.equal(warped[0, found], scores[0, found])


def test_transformers_own_warper_keeps_fewer():
    """The difference that this package is about, on the first two rows above."""
    for row, p, kept in (([0.5, 0.25, 0.25], 0.5, 1), ([0.3, 0.1, 0.1, 0.5], 0.8, 2)):
        theirs = transformers.TopPLogitsWarper(p)(None, scores_of(row))
        assert int((theirs > -math.inf).sum()) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "processor",
    [
        LlamaTemperatureLogitsWarper(0.6),
        LlamaTemperatureLogitsWarper(0),
        LlamaTemperatureLogitsWarper(1e-40),
        LlamaTopPLogitsWarper(0.9),
        LlamaSampler(0.6, 0.9),
        LlamaSampler(0.6, 0.9, seeds=1),
        LlamaSampler([0, 0.6], [0.9, 0.5], seeds=1),
    ],
)
def test_inputs_are_not_changed_in_place(processor, dtype):
    """transformers' output_logits hands out the very tensor that processors get."""
    scores, ids = (torch.randn(2, 300) * 3).to(dtype), torch.tensor([[1, 5], [1, 6]])
    before = scores.clone(), ids.clone()
    processor(ids, scores)
    assert torch.equal(scores, before[0])
    assert torch.equal(ids, before[1])


def test_temperature_divides_in_float32():
    """16-bit scores are cast first, as the reference casts its logits; 0 and the coldest leave the best token alone."""
    scores = torch.randn(3, 50, dtype=torch.bfloat16)
    assert torch.equal(LlamaTemperatureLogitsWarper(0.6)(None, scores), scores.float() / 0.6)
    for cold in (0, 0.0, 1e-45, 1e-38, 1e-31, 5e-324):
        probs = torch.softmax(LlamaTemperatureLogitsWarper(cold)(None, scores), -1)
        assert torch.isfinite(probs).all()
        best = scores.float() == scores.float().amax(-1, keepdim=True)
        assert torch.equal(probs > 0, best if cold else torch.nn.functional.one_hot(scores.argmax(-1), 50).bool())


def test_a_row_with_no_token_left_stays_so():
    """A dead beam's row of -inf is as transformers' own warpers leave it; nan would win the beam search."""
    scores = torch.tensor([[-math.inf] * 3, [1.0, -math.inf, 2.0]])
    assert torch.equal(LlamaTemperatureLogitsWarper(0.5)(None, scores), scores * 2)
    assert torch.equal(LlamaTopPLogitsWarper(0.9)(None, scores)[0], scores[0])


def test_warped_scores_give_the_samplers_distribution():
    """softmax over the warped scores is the reference's renormalized nucleus, within float32 rounding."""
    logits = torch.randn(40, 700) * 3
    warped = torch.softmax(warpers()(None, logits), dim=-1)
    probs = torch.softmax(logits / 0.6, dim=-1)
    ordered, ids = probs.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > 0.9] = 0
    expected = torch.zeros_like(probs).scatter(1, ids, ordered / ordered.sum(-1, keepdim=True))
    assert torch.equal(warped > 0, expected > 0)
    # A softmax of values up to M carries their half steps as parts of itself: two of them on each side; and its sum's.
    bound = float32_steps(logits / 0.6, 4) + relative(math.isqrt(700))
    torch.testing.assert_close(warped, expected, rtol=bound, atol=0)


def nucleus_of(model, temperature, top_p):
    """The next token's distribution after `PROMPT`, in float64 and plain Python."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1].double()
    probs = torch.softmax(logits / temperature, -1).tolist()
    return kept_tokens(probs, top_p)


def chi_square(drawn, expected):
    """The p-value of drawn tokens; 0 if any lies outside. Tokens expected fewer than five times share a cell."""
    if not set(drawn) <= set(expected):
        return 0.0
    often = [token for token, prob in expected.items() if prob * len(drawn) >= 5]
    counts = [drawn.count(token) for token in often]
    cells = [expected[token] * len(drawn) for token in often]
    if len(often) < len(expected):
        counts.append(len(drawn) - sum(counts))
        cells.append(len(drawn) - sum(cells))
    return stats.chisquare(counts, cells).pvalue


ALPHA = 1e-4
DRAWS = 20_000


def drawn_by(model, **kwargs):
    """The first tokens of 20,000 completions of `PROMPT`."""
    ids = torch.tensor([PROMPT])
    tokens = []
    for _ in range(8):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            num_return_sequences=DRAWS // 8,
            pad_token_id=0,
            **kwargs,
        )
        tokens += out[:, -1].tolist()
    assert len(tokens) == DRAWS
    return tokens


@pytest.mark.slow
def test_sampled_generate_with_the_warpers_draws_metas_distribution(plain_model):
    """A chi-square on 20,000 draws of plain transformers accepts the warpers, and rejects a planted top_p of .85."""
    expected = nucleus_of(plain_model, 0.6, 0.9)
    assert len(expected) > 5
    drawn = drawn_by(plain_model, **PLAIN, logits_processor=warpers(0.6, 0.9))
    assert chi_square(drawn, expected) > ALPHA
    planted = drawn_by(plain_model, **PLAIN, logits_processor=warpers(0.6, 0.85))
    assert set(planted) <= set(expected)  # a look at the supports would not do
    assert chi_square(planted, expected) < ALPHA


@pytest.mark.slow
def test_the_sampler_draws_metas_distribution(plain_model):
    """The same for LlamaSampler under greedy decoding, on both streams; a planted temperature is rejected."""
    expected = nucleus_of(plain_model, 0.6, 0.9)
    with torch.no_grad():
        logits = plain_model(torch.tensor([PROMPT])).logits[:, -1].expand(DRAWS, -1)
    ids = torch.tensor([PROMPT]).expand(DRAWS, -1)
    for kwargs in ({}, {"generator": torch.Generator().manual_seed(4)}, {"seeds": 12}):
        drawn = LlamaSampler(0.6, 0.9, **kwargs)(ids, logits).argmax(-1).tolist()
        assert chi_square(drawn, expected) > ALPHA, kwargs
    planted = LlamaSampler(0.63, 0.9, seeds=12)(ids, logits).argmax(-1).tolist()
    assert chi_square(planted, expected) < ALPHA


@pytest.mark.slow
def test_continuous_batching_draws_metas_distribution(plain_model):
    """The manager of generate_batch hands processors flat inputs: 4,000 draws pass, a planted top_p is rejected.

    generate_batch itself drops a `logits_processor` without a word (transformers 5.23), so the manager is given them.
    """
    batching = pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")
    expected = nucleus_of(plain_model, 0.6, 0.9)

    def drawn(top_p):
        manager = plain_model.init_continuous_batching(
            generation_config=GenerationConfig(**PLAIN, max_new_tokens=1, eos_token_id=2, pad_token_id=0),
            continuous_batching_config=transformers.ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=256),
        )
        manager.logit_processor = batching.ContinuousBatchingLogitsProcessorList(warpers(0.6, top_p))
        manager.start()
        manager.add_requests([PROMPT] * 4000, max_new_tokens=1)
        tokens = []
        while len(tokens) < 4000:
            answer = manager.get_result(timeout=1)
            assert answer is not None or manager.is_running()
            if answer is not None and answer.is_finished():
                tokens += answer.generated_tokens
        manager.stop(block=True)
        return tokens

    assert chi_square(drawn(0.9), expected) > ALPHA
    assert chi_square(drawn(0.8), expected) < ALPHA


def test_warpers_take_flat_inputs():
    """Continuous batching: input_ids of shape (rows,), scores (rows, V). The sampler refuses them by name."""
    flat, scores = torch.tensor([5, 6]), torch.randn(2, 90)
    assert torch.equal(warpers()(flat, scores), warpers()(torch.tensor([[5], [6]]), scores))
    with pytest.raises(ValueError, match=r"LlamaSampler needs input_ids of shape \(B, T\).*continuous batching"):
        LlamaSampler()(flat, scores)


def left_padded(prompts):
    """Ids and mask, with id 0 as padding."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def completions(model, prompts, sampler, **kwargs):
    """Of transformers' own generate, greedy, with the sampler; 12 tokens each."""
    ids, mask = left_padded(prompts)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
        pad_token_id=0,
        logits_processor=[sampler],
        **kwargs,
    )
    return out[:, ids.shape[1] :].tolist()


PROMPTS = [[1, 40, 41], [1, 300, 301, 302, 303, 304, 305], [1, 77]]


def test_the_sampler_on_metas_stream_equals_our_generate(plain_model, tiny_model):
    """In transformers' own generate, torch.manual_seed or a generator gives the tokens of our generate."""
    prompts = [[1, 40, 41], [1, 300, 301]]
    torch.manual_seed(8)
    ours = tiny_model.generate(prompts, max_gen_len=12, eos_token_id=[]).tokens
    torch.manual_seed(8)
    assert completions(plain_model, prompts, LlamaSampler()) == ours
    generator = torch.Generator().manual_seed(8)
    assert completions(plain_model, prompts, LlamaSampler(generator=generator)) == ours
    again = completions(plain_model, prompts, LlamaSampler(generator=generator))
    assert again != ours
    as_tensor = sample_top_p(torch.softmax(torch.randn(2, 9), -1), 0.9, generator=generator)
    assert as_tensor.shape == (2, 1)


def test_the_sampler_with_seeds_and_a_mask_equals_rows_alone(plain_model, tiny_model):
    """Left-padded, with the prompts' mask: the rows alone, and our generate with the same seeds."""
    _, mask = left_padded(PROMPTS)
    batch = completions(plain_model, PROMPTS, LlamaSampler(seeds=[5, 6, 9], attention_mask=mask))
    alone = [
        completions(plain_model, [prompt], LlamaSampler(seeds=seed))[0]
        for prompt, seed in zip(PROMPTS, (5, 6, 9), strict=True)
    ]
    assert batch == alone
    assert batch == tiny_model.generate(PROMPTS, max_gen_len=12, seeds=[5, 6, 9], eos_token_id=[]).tokens
    assert completions(plain_model, PROMPTS, LlamaSampler(seeds=5, attention_mask=mask))[0] == alone[0]


def test_one_sampler_serves_calls_of_any_batch_size(plain_model):
    """With seeds it holds no state that a second call would feel."""
    sampler = LlamaSampler(seeds=3)
    one = completions(plain_model, PROMPTS[:1], sampler)
    three = completions(plain_model, [PROMPTS[0]] * 3, sampler)
    assert completions(plain_model, PROMPTS[:1], sampler) == one
    assert three[0] == one[0]
    assert three[1] != one[0]


def test_per_row_settings_equal_rows_alone():
    """Greedy and sampled rows in one batch, with seeds."""
    logits, ids = torch.randn(4, 500) * 3, torch.ones(4, 6).long()
    temperatures, ps = [0.6, 0, 1.5, 1e-45], [0.9, 0.9, 0.5, 1.0]
    batch = LlamaSampler(temperatures, ps, seeds=[4, 5, 6, 7])(ids, logits)
    for row in range(4):
        alone = LlamaSampler(temperatures[row], ps[row], seeds=4 + row)(ids[:1], logits[row : row + 1])
        assert torch.equal(alone[0], batch[row])
    assert batch[1].argmax() == logits[1].argmax()


def test_a_greedy_row_among_sampled_ones_takes_the_first_of_equal_tokens():
    """As argmax does alone; a draw at temperature 1e-30 would pick any of them. 16-bit logits have many ties."""
    logits, ids = torch.tensor([[1.0] * 50, [1.0] * 50]), torch.ones(2, 3).long()
    alone = LlamaSampler(0)(ids[:1], logits[:1])
    for seed in range(5):
        for kwargs in ({"seeds": seed}, {"generator": torch.Generator().manual_seed(seed)}):
            assert torch.equal(LlamaSampler([0, 1.0], **kwargs)(ids, logits)[:1], alone)


def test_scores_are_one_hot():
    """0 at the token and -inf elsewhere: argmax and softmax both give it."""
    row = one_hot(torch.tensor([2, 0]), torch.zeros(2, 4, dtype=torch.bfloat16))
    assert row.tolist() == [[-math.inf, -math.inf, 0.0, -math.inf], [0.0, -math.inf, -math.inf, -math.inf]]
    assert row.dtype == torch.float32
    greedy = LlamaSampler(0)(torch.ones(1, 3).long(), torch.tensor([[1.0, 3.0, 2.0]]))
    assert greedy.tolist() == [[-math.inf, 0.0, -math.inf]]


def test_a_greedy_step_draws_nothing():
    """With temperature 0 the generator is not touched, as in the reference; a greedy row among sampled ones draws."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    LlamaSampler(0, generator=generator)(torch.ones(2, 3).long(), torch.randn(2, 9))
    assert torch.equal(generator.get_state(), before)
    LlamaSampler([0, 1], generator=generator)(torch.ones(2, 3).long(), torch.randn(2, 9))
    assert not torch.equal(generator.get_state(), before)


def test_samplers_can_be_copied_and_take_arrays():
    """deepcopy as pipelines do it; numpy numbers, arrays and tensors as per-row values."""
    ids, logits = torch.ones(2, 3).long(), torch.randn(2, 200) * 3
    expected = LlamaSampler([0.5, 0.7], 0.9, seeds=[3, 4])(ids, logits)
    assert torch.equal(copy.deepcopy(LlamaSampler([0.5, 0.7], 0.9, seeds=[3, 4]))(ids, logits), expected)
    for kind in (np.array, torch.tensor, tuple):
        seeds = kind([3, 4])
        temperatures = (
            kind([0.5, 0.7])
            if kind is tuple
            else kind([0.5, 0.7], dtype=(torch if kind is torch.tensor else np).float64)
        )
        assert torch.equal(LlamaSampler(temperatures, 0.9, seeds=seeds)(ids, logits), expected)
    assert torch.equal(LlamaSampler([0.5, 0.7], np.float64(0.9), seeds=np.int64(3))(ids, logits), expected)


@pytest.mark.parametrize("value", [-0.1, math.inf, -math.inf, math.nan, 10**400])
def test_bad_temperatures_are_refused(value):
    """Negative, infinite or nan: named with the value and the row."""
    for make in (LlamaTemperatureLogitsWarper, LlamaSampler):
        with pytest.raises((ValueError, TypeError), match="temperature must be"):
            make(value)
    with pytest.raises((ValueError, TypeError), match=r"temperature must be .* for row 1"):
        LlamaSampler([0.5, value])


@pytest.mark.parametrize("value", [-0.1, 1.0001, math.inf, math.nan])
def test_bad_top_p_is_refused(value):
    """Outside [0, 1]: named with the value and the row."""
    for refused in (lambda: LlamaTopPLogitsWarper(value), lambda: LlamaSampler(top_p=value)):
        with pytest.raises(ValueError, match=rf"top_p must lie in \[0, 1\], got {value}"):
            refused()
    with pytest.raises(ValueError, match=rf"top_p must lie in \[0, 1\], got {value} for row 1"):
        LlamaSampler(top_p=[0.5, value])
    with pytest.raises(ValueError, match="top_p must lie in"):
        sample_top_p(torch.ones(1, 1), value)


IDS, ZEROS = torch.ones(2, 3).long(), torch.zeros(2, 9)


@pytest.mark.parametrize(
    ("refused", "error", "message"),
    [
        (lambda: LlamaTemperatureLogitsWarper("0.6"), TypeError, "temperature must be a number, got '0.6'"),
        (lambda: LlamaTemperatureLogitsWarper(None), TypeError, "temperature must be a number, got None"),
        (lambda: LlamaTemperatureLogitsWarper(True), TypeError, "temperature must be a number, got True"),
        (lambda: LlamaTopPLogitsWarper([0.9]), TypeError, "top_p must be a number"),
        (lambda: LlamaSampler([]), ValueError, "temperature must be a number or one per row, got an empty list"),
        (lambda: LlamaSampler([0.1, "x"]), TypeError, "temperature must be a number, got 'x' for row 1"),
        (lambda: LlamaSampler([0.6] * 3)(IDS, ZEROS), ValueError, "temperature must be .*, got 3 for 2 rows"),
        (lambda: LlamaSampler(0.6, [0.5] * 3)(IDS, ZEROS), ValueError, "top_p must be .*, got 3 for 2 rows"),
        (lambda: LlamaSampler(seeds=1, generator=torch.Generator()), ValueError, "seeds and generator exclude"),
        (lambda: LlamaSampler(attention_mask=IDS), ValueError, "attention_mask .* needs seeds"),
        (lambda: LlamaSampler(seeds=1, attention_mask=IDS[0]), ValueError, r"attention_mask must be of shape \(B, T\)"),
        (
            lambda: LlamaSampler(seeds=1, attention_mask=torch.tensor([[0, 1], [1, 0]])),
            ValueError,
            "attention_mask must be left-padded, but row 1",
        ),
        (lambda: LlamaSampler(seeds=1, attention_mask=IDS[:1])(IDS, ZEROS), ValueError, "attention_mask must be one"),
        (lambda: LlamaSampler(seeds=-1), ValueError, r"seeds must lie in \[0, 2\*\*64\), got -1"),
        (lambda: LlamaSampler(seeds=2**64), ValueError, r"seeds must lie in \[0, 2\*\*64\)"),
        (lambda: LlamaSampler(seeds=2**64 - 1)(IDS, ZEROS), ValueError, r"seeds must lie .* for row 1"),
        (lambda: LlamaSampler(seeds=[])(IDS, ZEROS), ValueError, "seeds must be one value or one per row, got 0 for 2"),
        (
            lambda: LlamaSampler(seeds=[1])(IDS, ZEROS),
            ValueError,
            "seeds must be one value or one per row, got 1 for 2",
        ),
        (lambda: LlamaSampler(seeds=1.5), TypeError, "seeds must be an int or one int per row, got 1.5"),
        (lambda: LlamaSampler(seeds=True), TypeError, "seeds must be an int or one int per row, got True"),
        (lambda: LlamaSampler(seeds=[1, 2.0]), TypeError, "seeds must be ints, got 2.0 for row 1"),
        (lambda: LlamaSampler(seeds="12"), TypeError, "seeds must be an int or one int per row, got '12'"),
        (lambda: sample_top_p(torch.ones(3), 0.9), ValueError, r"probs must be of shape \(B, V\), got \(3,\)"),
    ],
)
def test_wrong_arguments_are_refused(refused, error, message):
    """The rule, the value, the row."""
    with pytest.raises(error, match=message):
        refused()


def test_the_ladder_reports_the_probability_drawn_with():
    """[.5, .25, .25] at p = .5: one of the first two (or its tie), with 2/3 or 1/3; greedy rows with 1."""
    scores, here = scores_of([0.5, 0.25, 0.125, 0.125]), {"rows": 1, "device": torch.device("cpu")}
    stream = PromptStreams([0], [0], [0])
    draw = TokenSampler(SamplingSettings(1.0, 0.5), stream, **here)(scores, 0)
    assert float(draw.probs) == pytest.approx({0: 2 / 3, 1: 1 / 3}[int(draw.tokens)], rel=relative(4))
    draw = TokenSampler(SamplingSettings(0.0, 0.5), stream, **here)(scores, 0)
    assert draw.tokens.tolist() == [0]
    assert draw.probs.tolist() == [1.0]


def test_the_sampler_draws_by_its_settings_as_they_are():
    """Attributes that are set anew, or changed in place, count from the next call on, and are checked."""
    ids, logits = torch.ones(2, 5).long(), torch.randn(2, 500) * 2

    def drawn(sampler):
        return sampler(ids, logits).argmax(-1).tolist()

    sampler = LlamaSampler([1.0, 1.0], seeds=1)
    drawn(sampler)
    sampler.seeds = 9
    assert drawn(sampler) == drawn(LlamaSampler(1.0, seeds=9))
    sampler.temperature[0] = 0
    assert drawn(sampler) == drawn(LlamaSampler([0, 1.0], seeds=9))
    sampler.top_p = torch.tensor([0.1, 0.2])
    assert drawn(sampler) == drawn(LlamaSampler([0, 1.0], [0.1, 0.2], seeds=9))
    sampler.seeds, sampler.generator = None, torch.Generator().manual_seed(3)
    again = LlamaSampler([0, 1.0], [0.1, 0.2], generator=torch.Generator().manual_seed(3))
    assert drawn(sampler) == drawn(again)
    sampler.temperature = -1.0
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\).*-1.0"):
        drawn(sampler)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_sampler_names_bad_logits(value):
    """Row and position, counted from the row's first real token; -inf is a processor's right."""
    ids, logits = torch.ones(2, 5).long(), torch.randn(2, 50)
    logits[0, :40] = float("-inf")
    LlamaSampler()(ids, logits)
    logits[1, 3] = value
    with pytest.raises(ValueError, match="position 5 of row 1 hold nan or inf"):
        LlamaSampler()(ids, logits)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="position 3 of row 1 hold nan or inf"):
        LlamaSampler(seeds=1, attention_mask=mask)(ids, logits)
