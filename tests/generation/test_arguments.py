"""Arguments mean what people write, in every form that can only mean one thing; what could mean two is refused."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from transformers import GenerationConfig

from hf_llama_sampling import with_llama_generation as with_ours
from tests.generation.helpers import EOS, LONG, OFTEN, RAGGED, SHORT, close


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: np.array(rows),
        lambda rows: np.array(rows, dtype=np.int32),
        lambda rows: (row for row in rows),
        lambda rows: [iter(row) for row in rows],
        lambda rows: dict(enumerate(rows)).values(),
        lambda rows: map(np.array, rows),
        lambda rows: np.array([None, *rows], dtype=object)[1:],
        lambda rows: {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
        lambda rows: transformers.BatchEncoding({"input_ids": torch.tensor(rows)}),
    ],
)
def test_prompts_come_in_anything_that_holds_them_in_order(tiny_model, make):
    """Arrays, generators, dict values, what a tokenizer returns: `generate` and `score_tokens` alike."""
    rows = [LONG, LONG[::-1]]
    expected = tiny_model.generate(rows, max_gen_len=3, seeds=1)
    assert tiny_model.generate(make(rows), max_gen_len=3, seeds=1).tokens == expected.tokens
    close(tiny_model.score_tokens(make(rows)).logprobs, tiny_model.score_tokens(rows).logprobs)


def test_a_column_of_a_table(tiny_model):
    """A pandas column holds prompts in order; a whole table does not."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"ids": RAGGED})
    expected = tiny_model.generate(RAGGED, max_gen_len=3, seeds=1).tokens
    assert tiny_model.generate(table["ids"], max_gen_len=3, seeds=1).tokens == expected
    with pytest.raises(TypeError, match="lists of token ids or a tensor"):
        tiny_model.generate(table, max_gen_len=3, seeds=1)


def test_what_a_tokenizer_returns_without_tensors(tiny_model, tiny_tokenizer):
    """`generate(**tokenizer(texts))`: lists of ids and lists of masks, ragged or padded by the tokenizer."""
    texts = ["ROMEO:", "What light through yonder window breaks?"]
    expected = tiny_model.generate([tiny_tokenizer(text).input_ids for text in texts], max_gen_len=4, seeds=1).tokens
    assert tiny_model.generate(**tiny_tokenizer(texts), max_gen_len=4, seeds=1).tokens == expected
    ids, mask = tiny_tokenizer(texts).input_ids, tiny_tokenizer(texts).attention_mask
    width = max(map(len, ids))
    ids = [[EOS] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + row for row in mask]
    assert tiny_model.generate(ids, attention_mask=mask, max_gen_len=4, seeds=1).tokens == expected
    with pytest.raises(ValueError, match="attention_mask beside prompts given as lists must have one value per token"):
        tiny_model.generate(RAGGED, attention_mask=mask, max_gen_len=4)


@pytest.mark.parametrize("value", [5, 0, 1, "no", None, 1.0])
@pytest.mark.parametrize("name", ["logprobs", "echo"])
def test_flags_are_true_or_false(tiny_model, name, value):
    """A number is no flag: `logprobs=5` asks for something else, and the sentence says how to get it."""
    with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}") as refusal:
        tiny_model.generate([SHORT], max_gen_len=2, **{name: value})
    if (name, value) == ("logprobs", 5):
        assert "top_logprobs=5" in str(refusal.value)
    assert tiny_model.generate([SHORT], max_gen_len=2, **{name: np.bool_(True)})[name if name != "echo" else "tokens"]


def test_minus_one_and_none_mean_no_eos(tiny_model):
    """`eos_token_id=-1` and None are the usual ways to say that nothing ends a text; a config's None says nothing."""
    for none in (-1, None):
        out = tiny_model.generate([SHORT] * 4, max_gen_len=40, seeds=0, eos_token_id=none)
        assert out.tokens == tiny_model.generate([SHORT] * 4, max_gen_len=40, seeds=0, eos_token_id=[]).tokens
        assert out.settings["eos_token_id"] == []
    config = GenerationConfig(max_new_tokens=1, eos_token_id=None)
    assert tiny_model.generate([SHORT], config).settings["eos_token_id"] == [EOS]
    ended = tiny_model.generate([SHORT] * 4, max_gen_len=40, seeds=0, eos_token_id=np.array([EOS, OFTEN]))
    assert "stop" in ended.finish_reason


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_looks_like_padding_needs_a_mask(tiny_model, side):
    """A tensor without a mask whose rows begin or end with the pad id: refused, since it may be text or not."""
    gap = [0] * (len(LONG) - len(SHORT))
    tensor = torch.tensor([gap + SHORT if side == "left" else SHORT + gap, LONG])
    with pytest.raises(ValueError, match="row 0 begins or ends with the pad id 0: pass attention_mask"):
        tiny_model.generate(tensor, max_gen_len=2, pad_token_id=0)
    text = tiny_model.generate(tensor, attention_mask=torch.ones_like(tensor), max_gen_len=2, pad_token_id=0, seeds=1)
    assert torch.equal(text, tiny_model.generate(tensor, max_gen_len=2, seeds=1))
    lists = tiny_model.generate(tensor.tolist(), max_gen_len=2, pad_token_id=0, seeds=1)
    assert torch.equal(lists.sequences, text)
    with pytest.warns(UserWarning, match="row 0 begins or ends with 0, which is both the pad id and an EOS id"):
        tiny_model.generate(tensor, max_gen_len=2, pad_token_id=0, eos_token_id=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_model.generate(torch.tensor([LONG]), max_gen_len=2, pad_token_id=0)


def test_one_way_to_raise_the_limit(tiny_model):
    """`max_seq_len=` raises what the config says of the context, in `generate` and in `score_tokens`."""
    text = [1, *range(3, 700)]
    for call in (tiny_model.score_tokens, lambda rows, **more: tiny_model.generate(rows, max_gen_len=2, **more)):
        with pytest.raises(ValueError, match="of 512 tokens, but row 1 has 698"):
            call([[1], text])
        call([[1], text], max_seq_len=800)
    out = tiny_model.generate([text, SHORT], max_gen_len=8, max_seq_len=800, seeds=1, eos_token_id=[], logprobs=True)
    assert [len(row) for row in out.tokens] == [8, 8] and out.settings["schedule"] == "padded"
    whole = tiny_model.score_tokens([text + out.tokens[0]], max_seq_len=800).logprobs[0]
    close([whole[-8:]], out.logprobs[:1])


def test_learned_positions_are_a_limit_that_cannot_be_raised():
    """GPT-2 has one vector per position: no index error, one sentence."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    model = with_ours(transformers.GPT2LMHeadModel(config).eval())
    with pytest.raises(
        ValueError, match="a text must not exceed the 16 positions that GPT2LMHeadModel has a table of, got"
    ):
        model.score_tokens([[1] * 20], max_seq_len=32)
    with pytest.raises(
        ValueError, match="must not exceed the 16 positions that GPT2LMHeadModel has a table of, got 24"
    ):
        model.generate([[1] * 20], max_gen_len=4, max_seq_len=32)
    assert len(model.generate([[1] * 12], max_gen_len=9, eos_token_id=[]).tokens[0]) == 4


def test_the_calls_own_words_go_before_a_configs(tiny_model, tiny_tokenizer):
    """A config that a pipeline adds by itself does not contradict what its user says."""
    config = GenerationConfig(max_new_tokens=256, max_length=300, do_sample=True)
    out = tiny_model.generate([SHORT], config, max_gen_len=5, max_seq_len=7, temperature=0, eos_token_id=[])
    assert [len(row) for row in out.tokens] == [4]
    assert out.settings["temperature"] == 0
    pipe = transformers.pipeline("text-generation", model=tiny_model, tokenizer=tiny_tokenizer)
    ids = tiny_tokenizer("ROMEO:").input_ids
    expected = tiny_model.generate([ids], max_gen_len=8, seeds=3).tokens[0]
    (answer,) = pipe("ROMEO:", max_gen_len=8, seeds=3, temperature=0.6)  # it would say 0.7
    assert answer["generated_text"] == tiny_tokenizer.decode(ids + expected, skip_special_tokens=True)
    with pytest.raises(ValueError, match="max_new_tokens means max_gen_len, but they differ"):
        tiny_model.generate([SHORT], max_gen_len=5, max_new_tokens=6)
