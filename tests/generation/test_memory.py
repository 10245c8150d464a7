"""Logprobs build no tensor of (batch, length, vocabulary), and keep none."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_llama_sampling import LlamaForCausalLM
from tests.bounds import ROUNDING

pytestmark = pytest.mark.slow


class Largest(TorchDispatchMode):
    """The number of elements of the largest floating-point tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture(scope="module")
def wide_model():
    """A tiny body under a vocabulary of 32,000, so that logits outweigh everything else but the embedding."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_logprobs_of_a_long_prompt_stay_within_the_budget(wide_model, schedule):
    """512 tokens of prompt with echo: the largest tensor is a chunk's, a small part of (B, T, V)."""
    prompts = [list(range(5, 517)), list(range(9, 521))]
    chunk_bytes = 8 << 20
    asked = {"echo": True, "logprobs": True, "top_logprobs": 2, "logprobs_of": [5, 6], "sampling_logprobs": True}
    with Largest() as largest:
        output = wide_model.generate(prompts, max_gen_len=2, schedule=schedule, chunk_bytes=chunk_bytes, **asked)
    assert [len(row) for row in output.logprobs] == [514, 514]
    weights = 32000 * 16
    assert largest.elements <= max(weights, chunk_bytes // 4)
    assert largest.elements < 2 * 512 * 32000 / 10


def test_score_tokens_stays_within_the_budget(wide_model):
    """The same bound for scoring, at four times the rows."""
    prompts = [list(range(5 + i, 517 + i)) for i in range(8)]
    with Largest() as largest:
        scores = wide_model.score_tokens(prompts, chunk_bytes=16 << 20, logprobs_of=[5, 6])
    assert len(scores.logprobs) == 8
    assert largest.elements <= (16 << 20) // 4


def test_a_plain_forward_would_not(wide_model):
    """What the bound is about: the whole prompt's logits at once are an order of magnitude larger."""
    with Largest() as largest, torch.no_grad():
        wide_model(torch.tensor([list(range(5, 517))] * 2))
    assert largest.elements == 2 * 512 * 32000


def test_the_budget_changes_nothing_but_memory(tiny_model):
    """Any chunk size gives the same tokens, and logprobs within float32 rounding."""
    prompts = [list(range(5, 60)), list(range(9, 30))]
    arguments = {"max_gen_len": 12, "seeds": 3, "echo": True, "logprobs": True}
    whole = tiny_model.generate(prompts, **arguments)
    for chunk_bytes in (1, 50_000, 400_000):
        chunked = tiny_model.generate(prompts, chunk_bytes=chunk_bytes, **arguments)
        assert chunked.tokens == whole.tokens
        for a, b in zip(chunked.logprobs, whole.logprobs, strict=True):
            assert a == pytest.approx(b, abs=ROUNDING)
