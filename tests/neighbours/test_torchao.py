"""Models that torchao quantizes on the CPU: int8 weights, in place and by transformers' own loading."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, TorchAoConfig

from hf_llama_sampling import LlamaForCausalLM, with_llama_generation
from tests.conftest import TINY
from tests.generation.helpers import RAGGED, SHORT, at, close, plain_logprobs

pytestmark = pytest.mark.neighbours

ASKED = {"max_gen_len": 6, "seeds": 1, "logprobs": True, "echo": True}


def in_place(folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    quantize_(model, Int8WeightOnlyConfig())
    return with_llama_generation(model)


def by_loading(folder):
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()


@pytest.fixture(scope="module", params=[in_place, by_loading], ids=lambda how: how.__name__)
def quantized(request):
    return request.param(TINY)


def test_it_is_quantized(quantized, tiny_model):
    """Its weights are int8, so its logits are not those of the model."""
    assert "int8" in repr(quantized.model.layers[0].mlp.up_proj.weight).lower().replace("torch.", "")
    ids = torch.tensor([SHORT])
    assert not torch.equal(quantized(ids).logits, tiny_model(ids).logits)


def test_greedy_tokens_are_transformers_own(quantized):
    """As transformers' loop gives them for the quantized model, row by row."""
    for prompt in RAGGED:
        config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=2)
        plain = super(type(quantized).__mro__[1], copy.copy(quantized)).generate(
            torch.tensor([prompt]), generation_config=config
        )
        ours = quantized.generate([prompt], max_gen_len=6, temperature=0)
        assert ours.sequences.tolist() == plain.tolist()


@pytest.mark.parametrize("more", [{}, {"schedule": "reference"}, {"cache_implementation": "static"}], ids=str)
def test_rows_and_logprobs_are_the_quantized_models(quantized, more):
    """Logprobs are those of its own forward, and a row is what it is alone."""
    out = quantized.generate(RAGGED, **ASKED, **more)
    for row, (tokens, logprobs) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
        close([logprobs], [at(plain_logprobs(quantized, tokens), tokens)])
        alone = quantized.generate([RAGGED[row]], **{**ASKED, "seeds": 1 + row})
        assert alone.tokens == [tokens]


def test_it_is_scored_and_copied(quantized):
    """`score_tokens` and `score_continuations` agree with the forward; a deep copy generates alike."""
    close(quantized.score_tokens([SHORT]).logprobs, [at(plain_logprobs(quantized, SHORT), SHORT)])
    scores = quantized.score_continuations([SHORT[:2]], [[SHORT[2:]]])
    close([scores.logprobs[0][0]], [at(plain_logprobs(quantized, SHORT), SHORT)[2:]])
    assert copy.deepcopy(quantized).generate(RAGGED, **ASKED).tokens == quantized.generate(RAGGED, **ASKED).tokens
