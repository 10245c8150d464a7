"""Where settings come from, which options count, and which are refused by name."""

import copy

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from hf_llama_sampling import LlamaForCausalLM
from hf_llama_sampling.generation.options import FOR_GENERATE, FOR_THE_LOOP
from tests.generation.helpers import EOS, OFTEN, RAGGED, SHORT


def test_a_checkpoint_contributes_no_sampling_settings(tiny_model, tmp_path):
    """generation_config.json says temperature .1, top_p .1, top_k 5, do_sample true: nothing changes."""
    tiny_model.save_pretrained(tmp_path)
    GenerationConfig(
        temperature=0.1, top_p=0.1, top_k=5, do_sample=True, repetition_penalty=3.0, eos_token_id=EOS, max_new_tokens=2
    ).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert model.generation_config.top_k == 5
    for stream in ({"seeds": 1}, {}):
        torch.manual_seed(3)
        ours = model.generate(RAGGED, max_gen_len=12, logprobs=True, **stream)
        torch.manual_seed(3)
        plain = tiny_model.generate(RAGGED, max_gen_len=12, logprobs=True, **stream)
        assert ours.tokens == plain.tokens
        assert ours.logprobs == plain.logprobs
        assert (ours.settings["temperature"], ours.settings["top_p"]) == (0.6, 0.9)
    assert model.generation_config.top_k == 5
    assert model.generation_config.temperature == 0.1


def test_settings_are_metas_defaults(tiny_model):
    """temperature .6, top_p .9, and what else was in force."""
    out = tiny_model.generate(RAGGED, max_gen_len=4, seeds=9)
    assert out.settings == {
        "temperature": 0.6,
        "top_p": 0.9,
        "max_gen_len": 4,
        "max_seq_len": 512,
        "seeds": [9, 10, 11],
        "num_return_sequences": 1,
        "schedule": "padded",
        "compat": "fixed",
        "echo": False,
        "eos_token_id": [EOS],
        "pad_token_id": EOS,
    }


def test_a_generation_config_in_the_call_counts(tiny_model):
    """Its settings are in force, the call's own words go before it, and it is left as it was."""
    config = GenerationConfig(temperature=1.0, top_p=0.3, max_new_tokens=3, eos_token_id=[EOS, OFTEN], pad_token_id=0)
    before = config.to_dict()
    out = tiny_model.generate(RAGGED, config, seeds=1)
    asked = {"temperature": 1.0, "top_p": 0.3, "max_gen_len": 3, "eos_token_id": [EOS, OFTEN], "seeds": 1}
    assert out.tokens == tiny_model.generate(RAGGED, **asked).tokens
    assert {name: out.settings[name] for name in ("temperature", "top_p", "max_gen_len")} == {
        "temperature": 1.0,
        "top_p": 0.3,
        "max_gen_len": 3,
    }
    out = tiny_model.generate(RAGGED, generation_config=config, top_p=0.5, max_new_tokens=2, seeds=1)
    assert (out.settings["top_p"], out.settings["max_gen_len"]) == (0.5, 2)
    assert config.to_dict() == before
    assert tiny_model.generate([SHORT], GenerationConfig(do_sample=False, max_length=5)).settings["temperature"] == 0


def test_a_checkpoints_own_config_may_be_passed(tiny_model):
    """`generation_config=model.generation_config` is what pipelines do."""
    out = tiny_model.generate([SHORT], tiny_model.generation_config, max_gen_len=4, seeds=1)
    assert out.tokens == tiny_model.generate([SHORT], max_gen_len=4, seeds=1).tokens


def test_eos_lists_of_the_checkpoint_and_of_the_call(tiny_model):
    """Any of them stops a row; the call's go before the checkpoint's; an empty list stops nothing."""
    model = copy.copy(tiny_model)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, OFTEN])
    free = model.generate([SHORT] * 6, max_gen_len=40, seeds=0, eos_token_id=[])
    assert all(len(row) == 40 for row in free.tokens)
    assert set(free.finish_reason) == {"length"}
    stopped = model.generate([SHORT] * 6, max_gen_len=40, seeds=0)
    for row, whole, why in zip(stopped.tokens, free.tokens, stopped.finish_reason, strict=True):
        end = next((i for i, token in enumerate(whole) if token in (EOS, OFTEN)), 40)
        assert row == whole[:end]
        assert why == ("stop" if end < 40 else "length")
    assert "stop" in stopped.finish_reason
    other = free.tokens[0][3]
    for given in (other, [other], (other,), torch.tensor([other]), np.int64(other)):
        row = model.generate([SHORT], max_gen_len=40, seeds=0, eos_token_id=given).tokens[0]
        assert row == free.tokens[0][: free.tokens[0].index(other)]


def test_aliases(tiny_model):
    """max_new_tokens means max_gen_len, max_length means max_seq_len, do_sample=False means temperature 0."""
    expected = tiny_model.generate(RAGGED, max_gen_len=5, max_seq_len=9, seeds=1).tokens
    assert tiny_model.generate(RAGGED, max_new_tokens=5, max_length=9, seeds=1).tokens == expected
    assert tiny_model.generate(RAGGED, max_gen_len=5, max_new_tokens=5, max_length=9, seeds=1).tokens == expected
    by_length = tiny_model.generate(RAGGED, max_length=9, seeds=1, eos_token_id=[])
    assert [len(row) for row in by_length.tokens] == [9 - len(prompt) for prompt in RAGGED]
    greedy = tiny_model.generate(RAGGED, max_gen_len=5, temperature=0).tokens
    assert tiny_model.generate(RAGGED, max_gen_len=5, do_sample=False).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=5, do_sample=False, temperature=[0, 0.0, 0]).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=torch.tensor([5, 5, 5]), do_sample=False).tokens == greedy
    assert tiny_model.generate(RAGGED, max_gen_len=[5] * 3, max_new_tokens=[5] * 3, do_sample=False).tokens == greedy


def public_options():
    """Every option of transformers' generation config that has no place here, with a value that asks for something."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - FOR_THE_LOOP - FOR_GENERATE
    values = {
        "num_beams": 4,
        "top_k": 5,
        "min_p": 0.1,
        "typical_p": 0.5,
        "renormalize_logits": 3,
        "output_scores": True,
    }
    return [(name, values.get(name, 2)) for name in sorted(names)]


REFUSED = [
    *public_options(),
    ("assistant_model", object()),
    ("assistant_tokenizer", object()),
    ("custom_generate", "x"),
    ("negative_prompt_ids", torch.ones(1, 2).long()),
    ("negative_prompt_attention_mask", torch.ones(1, 2)),
    ("inputs_embeds", torch.ones(1, 2, 192)),
    ("position_ids", torch.ones(1, 3).long()),
    ("labels", torch.ones(1, 3).long()),
    ("cache_implementation", "paged"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_options_without_a_place_are_refused_by_name(tiny_model, name, value):
    """None is silently ignored; the message names the option and a way out, and nothing is drawn."""
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=name):
        tiny_model.generate([SHORT], max_gen_len=2, **{name: value})
    if name not in ("cache_implementation",) and name in vars(GenerationConfig()):
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            tiny_model.generate([SHORT], config, max_gen_len=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_options_that_ask_for_nothing_are_taken(tiny_model):
    """Neutral values, None and False are no request."""
    neutral = {"top_k": 0, "typical_p": 1.0, "min_p": 0.0, "num_beams": 1, "early_stopping": False, "min_length": None}
    out = tiny_model.generate([SHORT], max_gen_len=4, seeds=1, assistant_model=None, **neutral)
    assert out.tokens == tiny_model.generate([SHORT], max_gen_len=4, seeds=1).tokens


def test_the_ways_out_of_the_refusals_work(tiny_model):
    """`TopKLogitsWarper` and the others in logits_processor edit before the draw."""
    for warper in (
        transformers.TopKLogitsWarper(1),
        transformers.MinPLogitsWarper(1.0),
        transformers.EpsilonLogitsWarper(0.9),
    ):
        out = tiny_model.generate(RAGGED, max_gen_len=5, seeds=1, logits_processor=[warper])
        assert out.tokens == tiny_model.generate(RAGGED, max_gen_len=5, temperature=0).tokens
