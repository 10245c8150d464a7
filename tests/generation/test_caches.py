"""Caches: of every kind, and handed from call to call."""

import copy

import pytest
import torch

from tests.generation.helpers import RAGGED, SHORT, close


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
