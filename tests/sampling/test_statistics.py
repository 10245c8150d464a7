"""Chi-squares, end to end through `generate` and `generate_batch`: all random-number contracts draw Meta's rule.

False alarms: a right sampler is compared fourteen times below (`accepted`): its marginals and its pairs under three
contracts and under continuous batching, an exact row under three, and three marginals beside a planted fault. Each
comparison rejects with probability `ALPHA`, so a run on other seeds raises a false alarm with probability 14 * `ALPHA`
= 7e-7 at most (a union bound, whatever their dependence). Cells expect at least `LEAST` draws, so that the chi-square
is near the statistic's own distribution. Seeds are fixed: a pass stays one. Planted wrong samplers must fall below the
same `ALPHA`.
"""

import collections

import pytest
import torch
import transformers
from scipy import stats
from transformers import LogitsProcessor

from hf_llama_sampling.sampling import fast_path, rule, streams
from hf_llama_sampling.sampling.continuous import RequestSettings
from tests.sampling.helpers import kept_tokens

pytestmark = pytest.mark.slow

PROMPT = [1, 40, 41]
ALPHA, LEAST = 5e-8, 20
DRAWS, CALLS = 8_000, 4
REQUESTS = 1_200  # under continuous batching; each costs the loop's own work
CONTRACTS = ["meta", "seeds", "copies"]
EXACT = [0.5, 0.25, 0.125, 0.125]  # sums of powers of two are exact, so at p = .5 the rule keeps two of them


def p_value(counts, expected):
    """Of observed cells against their probabilities; 0 if any lies outside. Rare cells are counted together."""
    total = sum(counts.values())
    if not set(counts) <= set(expected):
        return 0.0
    often = [cell for cell, prob in expected.items() if prob * total >= LEAST]
    found, wanted = [counts[cell] for cell in often], [expected[cell] * total for cell in often]
    rest = total - sum(wanted)
    if rest >= LEAST:
        found, wanted = [*found, total - sum(found)], [*wanted, rest]
    else:  # too few for a cell of their own: compare the others among themselves
        wanted = [cell * sum(found) / sum(wanted) for cell in wanted]
    return stats.chisquare(found, wanted).pvalue


def accepted(p):
    """Whether a p-value lets a sampler pass."""
    return p > ALPHA


@pytest.fixture(scope="module")
def expected(tiny_model):
    """The distribution after `PROMPT` at temperature .6 and top_p .9, from a plain forward."""
    with torch.no_grad():
        logits = tiny_model(torch.tensor([PROMPT])).logits[0, -1].double()
    found = kept_tokens(torch.softmax(logits / 0.6, -1).tolist(), 0.9)
    assert len(found) > 5
    return found


class Exactly(LogitsProcessor):
    """Logits whose softmax is `EXACT`, whatever the model says."""

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, : len(EXACT)] = torch.tensor(EXACT).log()
        return scores


def drawn(model, contract, *, draws=DRAWS, **kwargs):
    """The first tokens of many completions of `PROMPT`, in rows of one batch a call."""
    rows, tokens = draws // CALLS, []
    asked = {"max_gen_len": 1, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [], **kwargs}
    generator = torch.Generator().manual_seed(3)
    for call in range(CALLS):
        if contract == "copies":
            out = model.generate([PROMPT], num_return_sequences=rows, seeds=call, **asked)
        elif contract == "seeds":
            out = model.generate([PROMPT] * rows, seeds=10_000 * call, **asked)
        else:
            out = model.generate([PROMPT] * rows, generator=generator, **asked)
        tokens += [row[0] for row in out.tokens]
    assert len(tokens) == draws
    return tokens


def marginal(tokens, expected):
    """The p-value of drawn tokens."""
    return p_value(collections.Counter(tokens), expected)


def pairs(tokens, expected):
    """The p-value of neighbouring rows' tokens under independence."""
    joint = {(one, other): p * q for one, p in expected.items() for other, q in expected.items()}
    return p_value(collections.Counter(zip(tokens[::2], tokens[1::2], strict=True)), joint)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_generate_draws_metas_distribution(tiny_model, expected, contract):
    """Each token as often as the rule says, and neighbouring rows independent of each other."""
    tokens = drawn(tiny_model, contract)
    assert accepted(marginal(tokens, expected))
    assert accepted(pairs(tokens, expected))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_top_p_of_085_is_rejected(tiny_model, expected, contract):
    """All its tokens are in the nucleus, so a look at the support would not do."""
    tokens = drawn(tiny_model, contract, top_p=0.85)
    assert set(tokens) <= set(expected)
    assert not accepted(marginal(tokens, expected))


def plant_nucleus(monkeypatch, dropped_of):
    """Let generate use a nucleus that drops by another sentence: `dropped_of(ordered, top_p)`."""

    def nucleus(probs, top_p, *, stable=False):
        ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=stable)
        return rule.Nucleus(tokens, ordered, dropped_of(ordered, top_p))

    monkeypatch.setattr(fast_path, "on_cpu", lambda values: False)  # the rule's path, so that one place is planted
    monkeypatch.setattr(rule, "nucleus", nucleus)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_a_shifted_cumsum_is_rejected(tiny_model, expected, monkeypatch, contract):
    """The mass up to a token instead of the mass before it: the token that crosses top_p is lost."""
    plant_nucleus(monkeypatch, lambda ordered, top_p: ordered.cumsum(-1) > top_p)
    assert not accepted(marginal(drawn(tiny_model, contract), expected))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_transformers_tie_rule_is_rejected(tiny_model, monkeypatch, contract):
    """Where the mass before a token is exactly top_p, Meta keeps it: [.5, .25] of `EXACT`, transformers [.5] alone."""
    asked = {"temperature": 1.0, "top_p": 0.5, "logits_processor": [Exactly()], "draws": 4000}
    exact = kept_tokens(EXACT, 0.5)
    assert exact == {0: 0.5 / 0.75, 1: 0.25 / 0.75}
    assert accepted(marginal(drawn(tiny_model, contract, **asked), exact))

    def as_transformers_does(ordered, top_p):
        ascending = ordered.flip(-1).cumsum(-1).flip(-1)
        return (ascending <= 1 - top_p).index_fill(1, torch.tensor([0]), False)

    plant_nucleus(monkeypatch, as_transformers_does)
    assert not accepted(marginal(drawn(tiny_model, contract, **asked), exact))


@pytest.mark.parametrize("contract", ["meta", "copies"])
def test_noise_shared_by_two_rows_is_rejected(tiny_model, expected, monkeypatch, contract):
    """Each second row takes its neighbour's noise: every row alone is right, the pairs are not."""
    if contract == "copies":
        original = streams.PromptStreams.__init__

        def shared(self, seeds, copies, first_positions):
            original(self, seeds, [copy // 2 for copy in copies], first_positions)

        monkeypatch.setattr(streams.PromptStreams, "__init__", shared)
    else:
        original = streams.Block.first

        def shared(self, ranks, rows=None):
            rows = torch.arange(len(self.drawn)) if rows is None else rows
            return original(self, ranks, rows // 2 * 2)

        monkeypatch.setattr(streams.Block, "first", shared)
    tokens = drawn(tiny_model, contract)
    assert accepted(marginal(tokens[::2], expected))
    assert not accepted(pairs(tokens, expected))


def drawn_by_requests(model, **kwargs):
    """The first tokens of `REQUESTS` completions, each prompt's two copies side by side, many in flight at once."""
    pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")
    config = transformers.ContinuousBatchingConfig(page_size=4, num_blocks=300, max_batch_tokens=256)
    out = model.generate_batch(
        [PROMPT] * (REQUESTS // 2),
        continuous_batching_config=config,
        **{"seeds": 5, "max_gen_len": 1, "eos_token_id": [], "num_return_sequences": 2, **kwargs},
    )
    tokens = [result.generated_tokens[0] for result in out.values()]
    assert len(tokens) == REQUESTS
    return tokens


def test_continuous_batching_draws_metas_distribution(tiny_model, expected):
    """Requests and their children: each token as often as the rule says, and copies independent of each other."""
    tokens = drawn_by_requests(tiny_model)
    assert accepted(marginal(tokens, expected))
    assert accepted(pairs(tokens, expected))
    wrong = drawn_by_requests(tiny_model, top_p=0.8)
    assert set(wrong) <= set(expected) and not accepted(marginal(wrong, expected))


def test_noise_shared_by_requests_and_children_is_rejected(tiny_model, expected, monkeypatch):
    """A child that takes its request's noise: every row alone is right, the pairs are not."""
    monkeypatch.setattr(RequestSettings, "copy_of", lambda settings, request_id: 0)
    tokens = drawn_by_requests(tiny_model)
    assert accepted(marginal(tokens[::2], expected))
    assert not accepted(pairs(tokens, expected))
