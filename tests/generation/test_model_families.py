"""Models of other families under `with_llama_generation`."""

import copy
import pickle

import pytest
import torch
import transformers

from hf_llama_sampling import LlamaGenerationMixin
from hf_llama_sampling import with_llama_generation as with_ours
from tests.generation.helpers import GROUPED, LAYERS, SMALL, at, check_against_the_reference, close, plain_logprobs

pytestmark = pytest.mark.slow

OTHERS = {
    "gpt2": lambda: transformers.GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=48),
    "opt": lambda: transformers.OPTConfig(**SMALL, **LAYERS, ffn_dim=32, word_embed_proj_dim=32),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, head_dim=16, sliding_window=4),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, **LAYERS, intermediate_size=32),
    "bloom": lambda: transformers.BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=2),
}


@pytest.fixture(params=OTHERS)
def other(request):
    """A tiny random model of another family, its weights large enough that tokens differ."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(OTHERS[request.param]()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


def test_with_llama_generation_takes_any_causal_model(other, tmp_path):
    """Learned positions too: reference, padded, alone and the plain loop agree; weights are shared, the class not."""
    kind, attributes = type(other), set(vars(type(other)))
    ours = with_ours(other)
    assert isinstance(ours, (kind, LlamaGenerationMixin))
    assert type(other) is kind
    assert not isinstance(other, LlamaGenerationMixin)
    assert set(vars(kind)) == attributes
    assert all(a is b for a, b in zip(ours.parameters(), other.parameters(), strict=True))
    assert with_ours(ours) is ours
    assert type(with_ours(other)) is type(ours)

    prompts = [[1, 5, 6], [1, 7, 8, 9, 10, 11, 12, 13], [1, 9]]
    asked = {"max_gen_len": 6, "logprobs": True, "echo": True}
    dense = ours.generate(prompts, seeds=1, schedule="reference", **asked)
    for how in (
        {"schedule": "padded"},
        {"schedule": "padded", "chunk_bytes": 1},
        {"schedule": "reference", "chunk_bytes": 1},
    ):
        again = ours.generate(prompts, seeds=1, **how, **asked)
        assert again.tokens == dense.tokens
        close(again.logprobs, dense.logprobs)
    for row, prompt in enumerate(prompts):
        assert ours.generate([prompt], seeds=1 + row, **asked).tokens[0] == dense.tokens[row]
    close(ours.score_tokens(dense.tokens).logprobs, dense.logprobs)
    close(dense.logprobs, [at(plain_logprobs(other, row), row) for row in dense.tokens])
    check_against_the_reference(ours, prompts, {**asked, "max_seq_len": 40}, [2], 5)

    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is kind
    assert with_ours(loaded).generate(prompts, seeds=1, **asked).tokens == dense.tokens
    assert copy.deepcopy(ours).generate(prompts, seeds=1, **asked).tokens == dense.tokens
    assert pickle.loads(pickle.dumps(ours)).generate(prompts, seeds=1, **asked).tokens == dense.tokens


def test_hybrid_models_are_scored_in_one_chunk():
    """Recurrent states do not go on by chunks: what one chunk holds is right, and more is refused with the way out."""
    config = transformers.Lfm2Config(
        **GROUPED, layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False
    )
    torch.manual_seed(0)
    model = with_ours(transformers.Lfm2ForCausalLM(config).eval())
    prompts = [[1], [1, 5], [1, 5, 6, 7, 8], [1, *range(9, 19)]]
    alone = [model.score_tokens([prompt]).logprobs[0] for prompt in prompts]
    out = model.generate(prompts, max_gen_len=2, echo=True, logprobs=True, seeds=1)
    close([row[: len(prompt)] for row, prompt in zip(out.logprobs, prompts, strict=True)], alone)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM has none: raise chunk_bytes"):
        model.generate(prompts, max_gen_len=2, echo=True, logprobs=True, seeds=1, chunk_bytes=1)


def test_encoder_decoders_are_refused():
    """LLAMA2's loop continues its own prompt."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match="decoder-only model, but T5ForConditionalGeneration is an encoder-decoder"):
        with_ours(transformers.T5ForConditionalGeneration(config))
