"""Copies of a model by transformers, Python and torch: each generates what the model does."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_llama_sampling import LlamaForCausalLM, with_llama_generation
from tests.conftest import TINY
from tests.generation.batching import answers
from tests.generation.helpers import RAGGED

pytestmark = pytest.mark.slow

ASKED = {"max_gen_len": 5, "seeds": 1}


def by_torch(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def by_transformers(model, folder):
    model.save_pretrained(folder, max_shard_size="1MB")
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


COPIES = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch,
    "save_pretrained": by_transformers,
    "state_dict": lambda model, folder: _by_state(model),
}


def _by_state(model):
    other = LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("made_by", ["class", "with_llama_generation"])
def test_copies_answer_alike(tiny_model, tmp_path, how, made_by):
    """Both ways to our generate, in any way to copy, shards included."""
    model = tiny_model
    if made_by == "with_llama_generation":
        model = with_llama_generation(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)).eval()
    again = COPIES[how](model, tmp_path).eval()
    assert again is not model
    assert again.generate(RAGGED, **ASKED).tokens == tiny_model.generate(RAGGED, **ASKED).tokens


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_begins_without_the_manager_that_the_model_keeps(tiny_model, tmp_path, how):
    """Its threads and pages cannot be copied; the model keeps it."""
    tokens = tiny_model.generate(RAGGED, **ASKED).tokens
    tiny_model.generate_batch(RAGGED, persistent_manager=True, **ASKED)
    kept = tiny_model._cached_continuous_batching_manager
    try:
        again = COPIES[how](tiny_model, tmp_path).eval()
        for model in (again, tiny_model):
            results = model.generate_batch(RAGGED, persistent_manager=True, **ASKED)
            assert answers(results) == tokens
        assert tiny_model._cached_continuous_batching_manager is kept
        again.destroy_cached_continuous_batching_manager()
    finally:
        tiny_model.destroy_cached_continuous_batching_manager()


def test_a_saved_generation_config_comes_back(tiny_model, tmp_path):
    """Special tokens of one's own are saved with the model; sampling settings are too, and count for nothing here."""
    model = copy.copy(tiny_model)
    often = tiny_model.generate([[1, 5]], max_gen_len=1, temperature=0).tokens[0][0]
    model.generation_config = GenerationConfig(eos_token_id=[2, often], do_sample=True, temperature=0.1, top_k=3)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    out = again.generate([[1, 5]], max_gen_len=8, temperature=0)
    assert out.tokens == [[]] and out.finish_reason == ["stop"]
    assert again.generate(RAGGED, max_gen_len=5, seeds=1).settings["temperature"] == 0.6
