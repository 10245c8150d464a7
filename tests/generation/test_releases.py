"""What differs between releases of transformers: the name of a cache; and those that are too old are refused."""

import copy

import pytest
import torch
import transformers

from hf_llama_sampling.generation import adapters
from hf_llama_sampling.generation.releases import CACHE_NAME, CACHE_NAMES, OLDEST, check_release
from tests.generation.helpers import SHORT


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_taken_by_either_name(tiny_model, name):
    """Same tokens, and the cache is used: its columns are not forwarded again."""
    ids = torch.tensor([SHORT])
    first = tiny_model.generate(ids, max_gen_len=4, seeds=1, return_dict_in_generate=True, eos_token_id=[])
    cache = first[CACHE_NAME]
    plain = tiny_model.generate(first.sequences, max_gen_len=4, seeds=2)
    held, cache = cache.get_seq_length(), copy.deepcopy(cache)
    assert torch.equal(tiny_model.generate(first.sequences, max_gen_len=4, seeds=2, **{name: cache}), plain)
    assert cache.get_seq_length() > held
    assert torch.equal(tiny_model.generate(first.sequences, max_gen_len=4, seeds=2, **{name: None}), plain)


def test_both_names_at_once_are_refused(tiny_model):
    """They would be two caches."""
    cache = tiny_model.generate([SHORT], max_gen_len=4, seeds=1)[CACHE_NAME]
    with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
        tiny_model.generate([[*SHORT, 4]], max_gen_len=1, past_key_values=cache, cache=cache)


def test_nothing_is_said_of_names_that_will_go(tiny_model, caplog):
    """The release's own name is used, so transformers logs no notice of the older one."""
    transformers.utils.logging.warning_once.cache_clear()
    out = tiny_model.generate([[*SHORT, 4]] * 2, max_gen_len=2, seeds=1, share_prefix=True, logprobs=True, echo=True)
    tiny_model.score_continuations([SHORT], [[[4], [5, 6]]])
    assert out[CACHE_NAME] is not None
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.22.2", "5.23.0.dev0"])
def test_releases_with_wrong_answers_are_refused(version):
    """In one sentence with the way out, when the package is imported."""
    with pytest.raises(ImportError, match=rf"needs transformers {OLDEST} or newer, got {version}, .*: pip install"):
        check_release(version)


def test_newer_releases_are_taken():
    """The oldest one itself, this one, and those to come."""
    for version in (OLDEST, "5.23.1", transformers.__version__, "6.0.0", "5.25.0.dev0"):
        check_release(version)


def test_soft_prompts_that_peft_would_lose_are_refused(tiny_model, monkeypatch):
    """Under transformers 5.24 PEFT 0.21 hands them over by the older name, and its own generate loses them."""
    monkeypatch.setattr(adapters, "soft_prompts_of", lambda model: model)
    monkeypatch.setattr(adapters.importlib.metadata, "version", lambda name: "0.21.2")
    monkeypatch.setattr(adapters, "CACHE_NAME", "past_key_values")
    adapters.refuse_lost_soft_prompts(tiny_model)
    monkeypatch.setattr(adapters, "CACHE_NAME", "cache")
    with pytest.raises(ValueError, match=r"PEFT 0\.21\.2 loses soft prompts under .*: take transformers 5\.23"):
        adapters.refuse_lost_soft_prompts(tiny_model)
    monkeypatch.setattr(adapters.importlib.metadata, "version", lambda name: "0.22.0")
    adapters.refuse_lost_soft_prompts(tiny_model)
