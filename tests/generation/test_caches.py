"""Caches: of every kind, and handed from call to call."""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_llama_sampling import PromptCache
from hf_llama_sampling.generation import callers_cache
from hf_llama_sampling.generation.releases import CACHE_NAME
from tests.generation.helpers import RAGGED, SHORT, close

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "how",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"use_cache": True},
        {"prefill_chunk_size": 2},
        {"output_attentions": False},
        {"synced_gpus": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["reference", "padded"])
def test_caches(tiny_model, how, schedule):
    """Static cache, none, chunked prefill: the same tokens, and the same logprobs within float32 rounding."""
    asked = {"max_gen_len": 6, "seeds": 1, "logprobs": True, "echo": True, "schedule": schedule}
    plain = tiny_model.generate(RAGGED, **asked)
    out = tiny_model.generate(RAGGED, **asked, **how)
    assert out.tokens == plain.tokens
    close(out.logprobs, plain.logprobs)
    assert tiny_model.generate(RAGGED, max_gen_len=6, seeds=1, schedule=schedule, **how).tokens == [
        row[len(prompt) :] for row, prompt in zip(plain.tokens, RAGGED, strict=True)
    ]


def test_a_cache_goes_from_turn_to_turn(tiny_model):
    """past_key_values of one call in the next: the tokens of a call without it, logprobs of the whole text too."""
    first = tiny_model.generate(
        torch.tensor([SHORT]), max_gen_len=5, seeds=1, return_dict_in_generate=True, eos_token_id=[]
    )
    turn = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    for asked in ({}, {"echo": True, "logprobs": True}):
        fresh = tiny_model.generate(turn, max_gen_len=5, seeds=2, return_dict_in_generate=True, **asked)
        reused = tiny_model.generate(
            turn,
            max_gen_len=5,
            seeds=2,
            return_dict_in_generate=True,
            past_key_values=copy.deepcopy(first.past_key_values),
            **asked,
        )
        assert reused.tokens == fresh.tokens
        assert torch.equal(reused.sequences, fresh.sequences)
        if asked:
            close(reused.logprobs, fresh.logprobs)


def test_gradient_checkpointing_changes_no_answer(tiny_model):
    """In training with it transformers drops caches: each step reads the whole text; what needs a cache is refused."""
    model = copy.deepcopy(tiny_model)
    model.activation_checkpointing_enable()
    model.train()
    for schedule in ("reference", "padded"):
        asked = {"max_gen_len": 6, "seeds": 1, "logprobs": True, "schedule": schedule, "num_return_sequences": 2}
        plain = tiny_model.generate(RAGGED, **asked)
        out = model.generate(RAGGED, **asked, prompt_cache=PromptCache())
        assert out.tokens == plain.tokens
        close(out.logprobs, plain.logprobs)
    close(model.score_tokens(RAGGED).logprobs, tiny_model.score_tokens(RAGGED).logprobs)
    for name, value in {"cache_implementation": "static", CACHE_NAME: DynamicCache()}.items():
        with pytest.raises(ValueError, match=f"{name} has no place beside a model that trains with gradient checkp"):
            model.generate([SHORT], max_gen_len=2, **{name: value})
    assert model.training and model.is_activation_checkpointing


def test_a_call_in_training_leaves_no_verdict_behind(tiny_model):
    """Under dropout no two forwards agree, so nothing is read in chunks; afterwards texts are, as before."""
    model = copy.deepcopy(tiny_model)
    for layer in model.train().model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match="raise chunk_bytes"):
        model.score_tokens([SHORT], chunk_bytes=1)
    close(model.eval().score_tokens([SHORT], chunk_bytes=1).logprobs, tiny_model.score_tokens([SHORT]).logprobs)


@pytest.mark.parametrize(("rows", "copies"), [(1, 1), (2, 2), (3, 1)])
def test_a_cache_of_other_rows_is_refused(tiny_model, rows, copies):
    """One row per row of the batch, copies among them; the way out of the sentence works."""
    prompts = torch.tensor([SHORT, SHORT])
    with torch.no_grad():
        held = tiny_model(prompts[:1, :-1].expand(rows, -1)).past_key_values
    asked = {"max_gen_len": 3, "temperature": 0, "num_return_sequences": copies}
    with pytest.raises(ValueError, match=f"got {rows} for {2 * copies}: cache.batch_repeat_interleave"):
        tiny_model.generate(prompts, past_key_values=held, **asked)
    if rows * copies == 4:
        held.batch_repeat_interleave(copies)
        out = tiny_model.generate(prompts, past_key_values=held, **asked)
        assert torch.equal(out, tiny_model.generate(prompts, **asked))


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_another_text_is_refused(tiny_model, static):
    """One that was filled by another prompt, or is behind other padding: the place is named, and the way out works."""
    text, other = [1, *range(305, 315)], [1, *range(305, 309), *range(430, 440)]
    held = StaticCache(config=tiny_model.config, max_cache_len=40) if static else DynamicCache()
    asked = {"max_gen_len": 3, "temperature": 0, "eos_token_id": []}
    assert (
        tiny_model.generate([text], past_key_values=held, **asked).tokens == tiny_model.generate([text], **asked).tokens
    )
    with pytest.raises(
        ValueError, match="at position 5 of row 0 it holds something else: leave it out, and pass prompt_c"
    ):
        tiny_model.generate([other], past_key_values=held, **asked)
    kept = PromptCache()
    for prompt in (text, other):
        assert (
            tiny_model.generate([prompt], prompt_cache=kept, **asked).tokens
            == tiny_model.generate([prompt], **asked).tokens
        )


def test_a_cache_that_was_computed_in_other_bits_is_taken(tiny_model):
    """Caches of plain forwards in float32 and under autocast, and `generate` in the other."""
    ids = torch.tensor([[1, *range(40, 80)]])
    for first in (True, False):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=first):
            held = tiny_model(ids[:, :30]).past_key_values
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not first):
            assert tiny_model.generate(ids, past_key_values=held, max_gen_len=2, temperature=0).shape[1] > 41


def test_of_a_long_cache_the_beginning_is_looked_at(tiny_model, monkeypatch):
    """Reading all of it again would cost percents of a call."""
    monkeypatch.setattr(callers_cache, "_READ", 4)
    text = [1, *range(305, 315)]
    asked = {"max_gen_len": 2, "temperature": 0, "eos_token_id": []}
    for place, refused in ((2, True), (6, False)):
        held = DynamicCache()
        tiny_model.generate([text], past_key_values=held, **asked)
        other = [*text[:place], 500, *text[place + 1 :], 6, 7]
        with pytest.raises(ValueError, match="at position 2 of row 0") if refused else contextlib.nullcontext():
            tiny_model.generate([other], past_key_values=held, **asked)


def test_a_prefix_is_behind_the_batchs_padding(tiny_model):
    """A prefix's rows begin in column 0, and of a ragged batch the longest row alone does; what fits goes on."""
    prefix = [1, 5, 6, 7]
    asked = {"max_gen_len": 3, "temperature": 0, "eos_token_id": []}

    def held():
        with torch.no_grad():
            cache = tiny_model(torch.tensor([prefix])).past_key_values
        cache.batch_repeat_interleave(2)
        return cache

    even = [[*prefix, 8, 9], [*prefix, 10, 11]]
    assert (
        tiny_model.generate(even, past_key_values=held(), **asked).tokens == tiny_model.generate(even, **asked).tokens
    )
    with pytest.raises(ValueError, match="behind the same padding, and at position 0 of row 1"):
        tiny_model.generate([even[0], even[1][:5]], past_key_values=held(), **asked)


def test_a_cache_without_room_is_refused(tiny_model):
    """A static cache holds prompts and new tokens, but for the last."""
    asked = {"max_gen_len": 4, "temperature": 0, "eos_token_id": []}
    enough = StaticCache(config=tiny_model.config, max_cache_len=len(SHORT) + 3)
    out = tiny_model.generate([SHORT], past_key_values=enough, **asked)
    assert out.tokens == tiny_model.generate([SHORT], **asked).tokens
    few = StaticCache(config=tiny_model.config, max_cache_len=len(SHORT) + 2)
    with pytest.raises(ValueError, match=f"a cache of {len(SHORT) + 2} tokens is given for {len(SHORT)} . 4"):
        tiny_model.generate([SHORT], past_key_values=few, **asked)
    with pytest.raises(TypeError, match="a cache of a decoder alone, got EncoderDecoderCache"):
        tiny_model.generate([SHORT], past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()), **asked)
