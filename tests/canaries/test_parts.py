"""What this package relies on in transformers' parts beside the loop, and in torch."""

import copy
import inspect
import sys

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, TemperatureLogitsWarper


def test_a_cache_grows_by_new_tensors(plain):
    """`generation/caches.py`: `update` makes new tensors, so that rows may share those of a prefix."""
    cache = DynamicCache()
    keys = torch.randn(1, 2, 3, 4)
    cache.update(keys.expand(2, -1, -1, -1), keys.expand(2, -1, -1, -1), 0)
    held = cache.layers[0].keys
    before = held.clone()
    cache.update(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    assert cache.layers[0].keys is not held and torch.equal(held, before)
    assert cache.get_seq_length() == 4
    cache.crop(-1)
    assert torch.equal(cache.layers[0].keys, before)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, before[[1, 0]])


def test_a_shallow_copy_shares_all_weights(plain):
    """`generation/view.py`, `with_llama_generation`: no memory of its own, and a config that can be replaced."""
    view = copy.copy(plain)
    view.generation_config = GenerationConfig()
    assert all(a is b for a, b in zip(view.parameters(), plain.parameters(), strict=True))
    assert plain.generation_config.eos_token_id == 2


def test_what_a_pipeline_adds_by_itself(plain, tiny_tokenizer):
    """`generation/pipelines.py` looks for these in the pipeline's `forward`: they count as nobody's words."""
    heard = {}

    def generate(self, *, input_ids, attention_mask, **kwargs):
        heard.update(kwargs)
        return input_ids

    model = copy.copy(plain)
    model.__class__ = type(type(plain).__name__, (type(plain),), {"generate": generate})
    transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)("ROMEO:")
    assert {name: heard.get(name) for name in ("max_new_tokens", "do_sample", "temperature")} == {
        "max_new_tokens": 256,
        "do_sample": True,
        "temperature": 0.7,
    }
    base = sys.modules["transformers.pipelines.base"]
    assert "forward_params" in inspect.signature(base.Pipeline.forward).parameters


def test_the_names_of_keywords():
    """`generation/options.py`: the arguments of `generate` and of forwards that this package names."""
    given = inspect.signature(transformers.GenerationMixin.generate).parameters
    named = {"logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "streamer"}
    assert named <= set(given)
    forward = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    assert {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"} <= set(forward)
    assert len({"past_key_values", "cache"} & set(forward)) == 1


def test_continuous_batching_replaces_its_own_warpers():
    """`sampling/processors.py`: subclasses of transformers' warpers are replaced, others are kept as they are."""
    batching = pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")

    class Derived(TemperatureLogitsWarper):
        pass

    class Own(LogitsProcessor):
        supports_continuous_batching = True

    own = Own()
    listed = batching.ContinuousBatchingLogitsProcessorList([Derived(0.5), own], per_request_processors=True)
    kept = list(listed.logits_processor)
    assert kept[1] is own and not isinstance(kept[0], TemperatureLogitsWarper)


def test_a_long_text_changes_dynamic_factors_for_the_next(plain):
    """`generation/model_info.py`: dynamic rotary factors stay those of a longer text, under the names that we reset."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rotary = model.model.rotary_emb
    assert rotary.original_max_seq_len == 8 and rotary.rope_type == "dynamic"
    with torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.long))
    assert rotary.max_seq_len_cached == 16


def test_a_multinomial_draw_is_a_race():
    """`sampling/rule.py`: torch draws by argmax(p / Exp(1)) with the same generator."""
    probs = torch.rand(50, 100).softmax(-1)
    torch.manual_seed(3)
    drawn = torch.multinomial(probs, 1)[:, 0]
    torch.manual_seed(3)
    assert torch.equal((probs / torch.empty_like(probs).exponential_()).argmax(-1), drawn)
