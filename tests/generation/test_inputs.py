"""Reading prompts: lists, arrays and padded tensors; padding is a mask, never an id."""

import copy

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.generation.helpers import BOS, EOS, LONG, OFTEN, RAGGED, padded


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("schedule", ["reference", "padded"])
@pytest.mark.parametrize("pad", [0, EOS, BOS])
def test_a_padded_tensor_equals_lists(tiny_model, side, schedule, pad):
    """Padding is a mask, never inferred from ids: on either side, with any pad id, also one that stands in a prompt."""
    prompts = [[BOS, EOS, 0, 5], LONG, [pad, pad]]
    asked = {"max_gen_len": 6, "seeds": 3, "schedule": schedule, "echo": True, "logprobs": True}
    lists = tiny_model.generate(prompts, **asked)
    tensor = tiny_model.generate(**padded(prompts, side, pad), **asked)
    assert tensor.tokens == lists.tokens
    assert tensor.logprobs == lists.logprobs
    assert [row[: len(prompt)] for row, prompt in zip(lists.tokens, prompts, strict=True)] == prompts


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: tuple(map(tuple, rows)),
        lambda rows: [np.array(row) for row in rows],
        lambda rows: [torch.tensor(row) for row in rows],
        lambda rows: [[np.int64(token) for token in row] for row in rows],
        lambda rows: padded(rows, "left")["inputs"].to(torch.int32),
        lambda rows: padded(rows, "left")["inputs"].to(torch.uint8),
        lambda rows: np.array(rows, ">i4"),
        lambda rows: np.array(rows)[:, ::-1][:, ::-1],
        lambda rows: np.frombuffer(np.array(rows).tobytes(), np.int64).reshape(2, -1),  # read-only
    ],
)
def test_prompts_come_in_many_kinds(tiny_model, make):
    """Tuples, arrays, tensors of any integer type, with a mask of bools, floats or lists."""
    rows = [LONG, LONG[::-1]]
    expected = tiny_model.generate(rows, max_gen_len=3, seeds=1).tokens
    given = make(rows)
    for mask in (
        [None]
        if isinstance(given, (list, tuple))
        else [torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 7), [[1] * 7] * 2]
    ):
        out = tiny_model.generate(given, attention_mask=mask, max_gen_len=3, seeds=1, return_dict_in_generate=True)
        assert out.tokens == expected


def test_an_array_of_one_id_is_a_prompt(tiny_model):
    """A BOS alone, as a tensor or an array of one element, beside prompts of any length."""
    expected = tiny_model.generate([[BOS], [BOS, 5]], max_gen_len=3, seeds=1).tokens
    for kind in (np.array, torch.tensor):
        rows = [kind([BOS]), kind([BOS, 5])]
        assert tiny_model.generate(rows, max_gen_len=3, seeds=1).tokens == expected
        assert len(tiny_model.score_tokens(rows[:1], bos=BOS).logprobs[0]) == 1


def test_copies_hand_out_lists_of_their_own(tiny_model):
    """What a caller does to one row's `prompt_tokens` is seen in no other."""
    out = tiny_model.generate([[BOS, 5]], max_gen_len=1, temperature=0, num_return_sequences=2)
    out.prompt_tokens[0].append(9)
    assert out.prompt_tokens[1] == [BOS, 5]


def test_input_ids_and_batch_encodings(tiny_model, tiny_tokenizer):
    """`generate(**tokenizer(text))`, transformers' own way."""
    encoded = tiny_tokenizer(["To be, or not to be"], return_tensors="pt")
    out = tiny_model.generate(**encoded, max_gen_len=5, seeds=2)
    assert torch.equal(out, tiny_model.generate(encoded.input_ids, max_gen_len=5, seeds=2))
    with pytest.raises(ValueError, match="input_ids means inputs"):
        tiny_model.generate(encoded.input_ids, input_ids=encoded.input_ids + 1, max_gen_len=5)


def test_pad_and_eos_ids_inside_prompts_are_tokens(tiny_model):
    """A LLAMA2 chat prompt holds EOS between its turns: it stops nothing, and echo returns it."""
    prompts = [[BOS, 5, EOS, BOS, 6], [BOS, EOS, EOS], [0, 0, 0, 0, 0, 0]]
    for schedule in ("reference", "padded"):
        out = tiny_model.generate(prompts, max_gen_len=5, seeds=4, echo=True, schedule=schedule)
        for row, prompt in zip(out.tokens, prompts, strict=True):
            assert row[: len(prompt)] == prompt
            assert len(row) > len(prompt)


@pytest.mark.parametrize("pad", [-1, 5000])
def test_a_pad_id_is_a_mark(tiny_model, pad):
    """Old LLaMA checkpoints name pad -1, as Meta does: it is never embedded, and marks what is not text."""
    model = copy.copy(tiny_model)
    model.generation_config = GenerationConfig(eos_token_id=[EOS, OFTEN], pad_token_id=pad)
    expected = tiny_model.generate(RAGGED, max_gen_len=8, seeds=6, eos_token_id=[EOS, OFTEN], pad_token_id=0)
    for schedule in ("reference", "padded"):
        out = model.generate(RAGGED, max_gen_len=8, seeds=6, schedule=schedule)
        assert out.tokens == expected.tokens
    assert out.sequences[0, :4].tolist() == [pad] * 4
