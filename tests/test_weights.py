"""The real 135M weights against the plain loop. Skipped, with the reason, where they cannot be had."""

import pytest
import torch

from hf_llama_sampling.reference import reference_generate
from tests.bounds import rounding

pytestmark = pytest.mark.weights

TEXTS = ["The capital of France is", "Once upon a time there was a princess who lived in", "1, 2, 3,"]


@pytest.fixture(scope="module")
def prompts(weights_tokenizer):
    return [weights_tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_sampled_ragged_echo_and_logprobs(weights, prompts, schedule):
    """Same seed, same tokens as the plain loop; logprobs within float32 rounding of 30 layers."""
    settings = {"max_gen_len": 16, "temperature": 0.8, "top_p": 0.9, "echo": True, "logprobs": True}
    torch.manual_seed(11)
    ours = weights.generate(prompts, schedule=schedule, compat="meta", **settings)
    torch.manual_seed(11)
    tokens, logprobs = reference_generate(
        weights, prompts, max_seq_len=2048, eos_ids=ours.settings["eos_token_id"], **settings
    )
    assert ours.tokens == tokens
    for a, b in zip(ours.logprobs, logprobs, strict=True):
        assert a == pytest.approx(b, abs=rounding(weights))


def test_it_knows_the_capital_of_france(weights, weights_tokenizer, prompts):
    """The weights are the real ones, and greedy decoding reads them."""
    output = weights.generate(prompts[:1], max_gen_len=4, temperature=0.0)
    assert "Paris" in weights_tokenizer.decode(output.tokens[0], skip_special_tokens=True)
