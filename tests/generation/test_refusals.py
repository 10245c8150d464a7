"""Nothing wrong passes silently: each refusal names the rule, the value, the row and the way out; nothing changes."""

import math

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from hf_llama_sampling import LlamaForCausalLM, checks
from hf_llama_sampling import with_llama_generation as with_ours
from tests.bounds import rounding

TWO = [[1, 5], [1, 6, 7]]
IDS = torch.tensor([[1, 5, 6], [1, 7, 8]])
nan, inf = math.nan, math.inf

# What is passed besides `max_gen_len=2` (None: not even that), the error, and what the message must say.
REFUSED = {
    # prompts
    "no prompts": ({"inputs": None}, ValueError, ["needs prompts", "lists of token ids", "attention_mask"]),
    "empty batch": ({"inputs": []}, ValueError, ["at least one prompt", "got none"]),
    "empty tensor": ({"inputs": IDS[:0]}, ValueError, ["at least one prompt", "got none"]),
    "empty prompt": ({"inputs": [[1], []]}, ValueError, ["at least one token", "row 1", "BOS"]),
    "empty width": ({"inputs": IDS[:, :0]}, ValueError, ["at least one token", "row 0"]),
    "masked row": (
        {"inputs": IDS, "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        ValueError,
        ["at least one token", "row 1"],
    ),
    "id too large": (
        {"inputs": [[1], [5, 1024]]},
        ValueError,
        ["[0, 1024)", "got 1024", "position 1 of row 1", "tokenizer"],
    ),
    "id negative": ({"inputs": [[1, -1]]}, ValueError, ["[0, 1024)", "got -1", "position 1 of row 0"]),
    "id negative in a tensor": ({"inputs": -IDS}, ValueError, ["[0, 1024)", "got -1", "position 0 of row 0"]),
    "id a float": ({"inputs": [[1, 2.0]]}, TypeError, ["token ids must be ints", "row 0"]),
    "id text": ({"inputs": [[1], ["a"]]}, TypeError, ["token ids must be ints", "row 1"]),
    "one prompt bare": ({"inputs": [1, 5]}, TypeError, ["list of lists", "[prompt]"]),
    "text": ({"inputs": "To be"}, TypeError, ["token ids, got text", "tokenizer"]),
    "texts": ({"inputs": ["To be", "or not"]}, TypeError, ["token ids, got text", "tokenizer"]),
    "a number": ({"inputs": 7}, TypeError, ["lists of token ids", "int"]),
    "a prompt of None": ({"inputs": [[1], None]}, TypeError, ["list of token ids", "NoneType", "row 1"]),
    "float tensor": ({"inputs": IDS.float()}, ValueError, ["integers", "float32"]),
    "bool tensor": ({"inputs": IDS > 2}, ValueError, ["integers", "bool"]),
    "one dimension": ({"inputs": IDS[0]}, ValueError, ["shape (B, T)", "(3,)", "inputs[None]"]),
    "three dimensions": ({"inputs": IDS[None]}, ValueError, ["shape (B, T)", "(1, 2, 3)"]),
    "two kinds of input": ({"inputs": IDS, "input_ids": IDS + 1}, ValueError, ["input_ids means inputs", "drop one"]),
    # masks
    "hole": (
        {"inputs": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])},
        ValueError,
        ["one run of ones", "row 1", "hole", "one side"],
    ),
    "mask of weights": (
        {"inputs": IDS, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 2]])},
        ValueError,
        ["0 and 1", "got 2", "row 1"],
    ),
    "mask of another shape": ({"inputs": IDS, "attention_mask": IDS[:, :2]}, ValueError, ["shape", "(2, 2)", "(2, 3)"]),
    "mask beside lists": ({"inputs": TWO, "attention_mask": IDS}, ValueError, ["attention_mask", "lists", "drop it"]),
    # lengths
    "no length": ({"max_gen_len": None}, ValueError, ["max_gen_len must be given", "max_new_tokens"]),
    "negative length": ({"max_gen_len": -1}, ValueError, ["max_gen_len", "at least 0", "got -1"]),
    "negative length of a row": ({"max_gen_len": [1, -2]}, ValueError, ["max_gen_len", "got -2", "row 1"]),
    "float length": ({"max_gen_len": 2.0}, TypeError, ["max_gen_len must be an int", "2.0"]),
    "bool length": ({"max_gen_len": True}, TypeError, ["max_gen_len must be an int", "True"]),
    "text length": ({"max_gen_len": "2"}, TypeError, ["max_gen_len must be an int", "'2'"]),
    "no lengths": ({"max_gen_len": []}, ValueError, ["max_gen_len", "one per row", "got 0 for 2 rows"]),
    "three lengths": ({"max_gen_len": [1, 2, 3]}, ValueError, ["max_gen_len", "one per row", "got 3 for 2 rows"]),
    "two lengths at once": ({"max_new_tokens": 3}, ValueError, ["max_new_tokens means max_gen_len", "drop one"]),
    "too long a prompt": (
        {"max_seq_len": 2},
        ValueError,
        ["max_seq_len of 2 tokens", "row 1 has 3", "shorten or split"],
    ),
    "too long for max_length": ({"max_length": 2}, ValueError, ["of 2 tokens", "row 1 has 3"]),
    "too long for the context": ({"inputs": [[1] * 513]}, ValueError, ["of 512 tokens", "row 0 has 513"]),
    "max_seq_len 0": ({"max_seq_len": 0}, ValueError, ["max_seq_len", "at least 1", "got 0"]),
    "max_seq_len a float": ({"max_seq_len": 9.5}, TypeError, ["max_seq_len must be an int", "9.5"]),
    "two totals at once": (
        {"max_seq_len": 9, "max_length": 8},
        ValueError,
        ["max_length means max_seq_len", "drop one"],
    ),
    # temperature and top_p
    **{
        f"temperature {value}": (
            {"temperature": value},
            ValueError,
            ["temperature must be 0", "finite", f"got {value}"],
        )
        for value in (-0.1, nan, inf, -inf)
    },
    "temperature of a row": ({"temperature": [0.5, -1]}, ValueError, ["temperature", "got -1", "row 1"]),
    "three temperatures": ({"temperature": [1, 2, 3]}, ValueError, ["temperature", "one per row", "got 3 for 2 rows"]),
    "no temperatures": ({"temperature": []}, ValueError, ["temperature", "one per row", "empty"]),
    "temperature as text": ({"temperature": "0.6"}, TypeError, ["temperature must be a number", "'0.6'"]),
    "huge temperature": ({"temperature": 10**310}, TypeError, ["temperature must be a number"]),
    **{
        f"top_p {value}": ({"top_p": value}, ValueError, ["top_p must lie in [0, 1]", f"got {value}"])
        for value in (-0.1, 1.1, nan, inf)
    },
    "top_p of a row": ({"top_p": [0.5, 2]}, ValueError, ["top_p", "got 2", "row 1"]),
    "three top_p": ({"top_p": [1, 0, 1]}, ValueError, ["top_p", "one per row", "got 3 for 2 rows"]),
    "bad top_p beside greedy": ({"top_p": 7, "temperature": 0}, ValueError, ["top_p must lie in [0, 1]", "got 7"]),
    "greedy twice over": (
        {"do_sample": False, "temperature": 0.5},
        ValueError,
        ["do_sample=False means temperature 0", "0.5", "drop one"],
    ),
    "sampling greedily": ({"do_sample": True, "temperature": 0}, ValueError, ["do_sample=True", "temperature 0"]),
    # random numbers
    "two streams": (
        {"seeds": 1, "generator": torch.Generator()},
        ValueError,
        ["seeds and generator exclude each other", "one of the two"],
    ),
    "negative seed": ({"seeds": -1}, ValueError, ["seeds", "[0, 2**64)", "got -1"]),
    "huge seed": ({"seeds": 2**64}, ValueError, ["seeds", "[0, 2**64)", str(2**64)]),
    "seed that grows too large": ({"seeds": 2**64 - 1}, ValueError, ["seeds", "[0, 2**64)", "row 1"]),
    "one seed of two": ({"seeds": [1]}, ValueError, ["seeds", "one per row", "got 1 for 2 rows"]),
    "no seeds": ({"seeds": []}, ValueError, ["seeds", "one per row", "got 0 for 2 rows"]),
    "seed a float": ({"seeds": [1, 2.5]}, TypeError, ["seeds must be ints", "2.5", "row 1"]),
    "seed as text": ({"seeds": "1"}, TypeError, ["seeds must be an int or one int per row", "'1'"]),
    "seed a bool": ({"seeds": True}, TypeError, ["seeds must be an int", "True"]),
    "seeds per copy": (
        {"seeds": [1, 2, 3, 4], "num_return_sequences": 2},
        ValueError,
        ["seeds", "got 4 for 2 rows"],
    ),
    "generator a number": ({"generator": 5}, TypeError, ["generator must be a torch.Generator", "got 5", "seeds="]),
    # the rest
    "num_return_sequences 0": ({"num_return_sequences": -1}, ValueError, ["num_return_sequences", "at least 1"]),
    "top_logprobs": ({"top_logprobs": -1}, ValueError, ["top_logprobs", "from 0 to 1024", "got -1"]),
    "too many top_logprobs": ({"top_logprobs": 1025}, ValueError, ["top_logprobs", "from 0 to 1024", "got 1025"]),
    "chunk_bytes": ({"chunk_bytes": 0}, ValueError, ["chunk_bytes", "at least 1", "got 0"]),
    "schedule": ({"schedule": "fast"}, ValueError, ["schedule", "'auto', 'reference', 'padded'", "'fast'"]),
    "compat": ({"compat": "new"}, ValueError, ["compat", "'fixed', 'meta'", "'new'"]),
    "eos outside": ({"eos_token_id": 1024}, ValueError, ["eos_token_id", "from 0 to 1023", "got 1024"]),
    "eos negative": ({"eos_token_id": [2, -1]}, ValueError, ["eos_token_id", "got -1"]),
    "eos as text": ({"eos_token_id": "</s>"}, TypeError, ["eos_token_id must be an int", "'</s>'"]),
    "token_type_ids": ({"token_type_ids": torch.zeros(2, 3)}, TypeError, ["token_type_ids", "leave it out"]),
    "assistant": ({"assistant_model": "x"}, ValueError, ["assistant_model", "transformers' own model class"]),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 2, 192)}, ValueError, ["inputs_embeds", "pass token ids"]),
    "unknown keyword": ({"temprature": 0.6}, TypeError, ["no keyword 'temprature'", "temperature"]),
    "unknown keyword without a neighbour": ({"zzzzqqq": 1}, TypeError, ["no keyword 'zzzzqqq'"]),
    "unknown keyword of None": ({"zzzzqqq": None}, TypeError, ["no keyword 'zzzzqqq'"]),
    "a method's name": ({"validate": False}, TypeError, ["no keyword 'validate'"]),
    "a private name": ({"_from_model_config": True}, ValueError, ["_from_model_config=True has no place"]),
    "config a dict": (
        {"generation_config": {"top_p": 0.5}},
        TypeError,
        ["generation_config", "GenerationConfig", "dict"],
    ),
    "config with beams": ({"generation_config": GenerationConfig(num_beams=3)}, ValueError, ["num_beams=3"]),
    "config with an argument of ours": (
        {"generation_config": GenerationConfig(seeds=1)},
        ValueError,
        ["seeds must stand in the call of generate", "take seeds=1 out of the config"],
    ),
    "config with a bad value": ({"generation_config": GenerationConfig(eos_token_id=5000)}, ValueError, ["got 5000"]),
    "stop strings without a tokenizer": ({"stop_strings": ["x"]}, ValueError, ["stop_strings", "tokenizer="]),
    "max_time in ragged reference": (
        {"max_time": 2.0, "schedule": "reference"},
        ValueError,
        ["max_time", "reference", "padded"],
    ),
    "cache of a ragged reference batch": (
        {"past_key_values": transformers.DynamicCache(), "schedule": "reference"},
        ValueError,
        ["past_key_values", "padded"],
    ),
    "paged": ({"cache_implementation": "paged"}, ValueError, ["paged", "manager"]),
}


@pytest.mark.parametrize(("given", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_generate_refuses(tiny_model, given, error, says):
    """What the message must say is in the table; the generators, the arguments and the model stay as they were."""
    given = {"inputs": TWO, "max_gen_len": 2, **given}
    own = given.get("generator")
    state = torch.get_rng_state(), own.get_state() if isinstance(own, torch.Generator) else None
    attributes, config = dict(vars(tiny_model)), tiny_model.generation_config.to_dict()
    with pytest.raises(error) as refusal:
        tiny_model.generate(**given)
    message = str(refusal.value)
    assert [part for part in says if part not in message] == [], message
    assert "\n" not in message
    assert len(message) < 400
    assert torch.equal(torch.get_rng_state(), state[0])
    assert state[1] is None or torch.equal(own.get_state(), state[1])
    assert dict(vars(tiny_model)) == attributes
    assert tiny_model.generation_config.to_dict() == config
    assert TWO == [[1, 5], [1, 6, 7]]


SCORING = {
    "empty batch": ([], {}, ["at least one prompt"]),
    "empty prompt": ([[1], []], {}, ["at least one token", "row 1"]),
    "id outside": ([[1, 5000]], {}, ["[0, 1024)", "got 5000", "position 1 of row 0"]),
    "hole": (IDS, {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])}, ["row 0", "hole"]),
    "too long": ([[1], [1] * 513], {}, ["the model's context of 512 tokens", "row 1 has 513"]),
    "top_logprobs": (TWO, {"top_logprobs": 1025}, ["top_logprobs", "got 1025"]),
    "chunk_bytes": (TWO, {"chunk_bytes": 0}, ["chunk_bytes", "got 0"]),
}


@pytest.mark.parametrize(("prompts", "given", "says"), SCORING.values(), ids=SCORING)
def test_score_tokens_refuses(tiny_model, prompts, given, says):
    """The same checks before anything is forwarded."""
    with pytest.raises(ValueError) as refusal:
        tiny_model.score_tokens(prompts, **given)
    assert [part for part in says if part not in str(refusal.value)] == [], str(refusal.value)


def test_a_cache_as_long_as_the_prompts_is_refused(tiny_model):
    """The text that goes with a cache has at least one token that the cache does not hold."""
    with torch.no_grad():
        cache = tiny_model(torch.tensor([[1, 5, 6]])).past_key_values
    with pytest.raises(ValueError, match="must hold fewer tokens than the prompts, got 3 for prompts of 3: pass the"):
        tiny_model.generate([[1, 5, 6]], max_gen_len=2, past_key_values=cache)


def test_a_generator_of_another_device_is_refused(tiny_model, monkeypatch):
    """It draws on its own device only."""
    with pytest.raises(ValueError, match=r"generator must live on the model's device cuda.*one on cpu"):
        checks.check_generator(torch.Generator(), torch.device("cuda", 0))


def test_encoder_decoders_are_refused():
    """By name, with the way out."""
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0
    )
    with pytest.raises(ValueError, match=r"decoder-only.*T5ForConditionalGeneration.*LlamaTopPLogitsWarper"):
        with_ours(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_a_key_value_cache_is_scored_in_one_chunk():
    """A state-space model has no cache to hand on: where one chunk does not hold it all, the message says so."""
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = with_ours(transformers.MambaForCausalLM(config).eval())
    text = [1, 5, 6, 7]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([text])).logits[0], -1)[[0, 1, 2], text[1:]].tolist()
    enough = 16 * 32 * 3 // 3  # the last token needs no forward
    assert model.score_tokens([text], chunk_bytes=enough).logprobs[0][1:] == pytest.approx(
        expected, abs=rounding(model)
    )
    out = model.generate([text], max_gen_len=2, echo=True, logprobs=True, seeds=1)
    assert out.logprobs[0][1:4] == pytest.approx(expected, abs=rounding(model))
    with pytest.raises(ValueError, match=rf"MambaForCausalLM has none: raise chunk_bytes, here to {enough}"):
        model.score_tokens([text], chunk_bytes=enough - 1)


def test_a_checkpoint_without_a_context_needs_a_length():
    """Where the config does not say how long a text may be, nothing is made up."""
    config = transformers.BloomConfig(
        vocab_size=32, hidden_size=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = with_ours(transformers.BloomForCausalLM(config).eval())
    with pytest.raises(ValueError, match="max_gen_len must be given"):
        model.generate([[1, 5]])
    assert len(model.generate([[1, 5]], max_gen_len=40, eos_token_id=[]).tokens[0]) == 40


def test_what_looks_odd_but_means_something_is_taken(tiny_model):
    """1 for 1.0, numpy numbers, 0-dim tensors, arrays: the same as plain numbers."""
    plain = tiny_model.generate(TWO, max_gen_len=3, temperature=1.0, top_p=1.0, seeds=5).tokens
    for kind in (int, np.float32, np.int64, torch.tensor):
        length = kind(3) if kind is not np.float32 else 3
        seed = kind(5) if kind is not np.float32 else 5
        odd = tiny_model.generate(TWO, max_gen_len=length, temperature=kind(1), top_p=kind(1), seeds=seed)
        assert odd.tokens == plain
    for kind in (np.array, torch.tensor, tuple):
        odd = tiny_model.generate(
            TWO, max_gen_len=kind([3, 3]), temperature=kind([1, 1]), top_p=kind([1, 1]), seeds=kind([5, 6])
        )
        assert odd.tokens == plain


def test_an_eos_outside_the_vocabulary_in_a_checkpoint_is_named():
    """A row could never end there."""
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = 50256
    with pytest.raises(ValueError, match="eos_token_id must be from 0 to 7, got 50256"):
        model.generate([[1]], max_gen_len=2)
    assert model.generate([[1]], max_gen_len=2, eos_token_id=2).finish_reason


def test_a_model_without_weights_is_refused(tiny_model):
    """On the device meta, as accelerate's init_empty_weights leaves it: by every method, before it is forwarded."""
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model.config)
    calls = [
        lambda: model.generate(TWO, max_gen_len=2),
        lambda: model.score_tokens(TWO),
        lambda: model.score_continuations([[1]], [[[5]]]),
        lambda: model.generate_batch(TWO, max_gen_len=2),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"must hold its weights, .* on the device meta, .*: load it with from_pret"
        ):
            call()
