"""Code Llama's infilling format against answers recorded from its own code."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llama_sampling import Llama, Tokenizer
from hf_llama_sampling.llama.infilling import (
    continuing_text,
    continuing_tokens,
    infilling_ids,
    infilling_tokens,
    token_pieces,
)
from tests.conftest import GOLDEN, TINY

RECORDED = json.loads((GOLDEN / "infilling.json").read_text(encoding="utf-8"))
TEXTS = ["", " ", "  two", "x", " x ", "\n\tif a:\n", "☺", "é你😀", "a☺b", "\n"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(GOLDEN / "infilling.model")


@pytest.mark.parametrize("case", RECORDED["cases"][::2])
def test_prompts_are_the_recorded_ones(tokenizer, case):
    """Both orders give the ids that reached Code Llama's `generate`."""
    pairs = zip(RECORDED["prefixes"], RECORDED["suffixes"], strict=True)
    made = [infilling_tokens(p, s, tokenizer, suffix_first=case["suffix_first"]) for p, s in pairs]
    assert made == case["prompt_tokens"]
    assert infilling_ids(tokenizer).end == RECORDED["eot_id"] == case["stop_token"]


def test_generated_ids_are_the_recorded_texts(tokenizer):
    """Text between, and pieces as the vocabulary spells them."""
    predictions = RECORDED["cases"][1]["predictions"]
    for ids, prediction in zip(RECORDED["generated"], predictions, strict=False):
        if prediction["tokens"]:
            assert continuing_text(ids, tokenizer) == prediction["generation"]
            assert token_pieces(ids, tokenizer) == prediction["tokens"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_continues_another_survives(tokenizer, text):
    """Spaces at its start are neither added nor lost."""
    assert continuing_text(continuing_tokens(text, tokenizer), tokenizer) == text


def test_a_tokenizer_without_marks_is_refused():
    """LLAMA2's own has none; the sentence says which tokenizer has."""
    with pytest.raises(ValueError, match=r"infilling needs a tokenizer with Code Llama's marks.*take the tokenizer"):
        infilling_ids(Tokenizer(TINY / "tokenizer.model"))


@pytest.fixture
def codellama(tokenizer):
    """A random model of the recorded tokenizer's size."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=tokenizer.n_words, max_position_embeddings=256, **size)
    return Llama(LlamaForCausalLM(config).eval(), tokenizer)


@pytest.mark.parametrize("case", RECORDED["cases"])
def test_predictions_are_the_recorded_ones(codellama, monkeypatch, case):
    """Prompts, limit and stop token reach `generate`, and its answer becomes the recorded predictions."""
    seen = {}

    def stand_in(prompt_tokens, max_gen_len, temperature, top_p, logprobs, echo, stop_token):
        seen.update(prompt_tokens=prompt_tokens, max_gen_len=max_gen_len, stop_token=stop_token)
        tokens = [RECORDED["generated"][row % 4] for row in range(len(prompt_tokens))]
        return tokens, [[-0.5] * len(row) for row in tokens] if logprobs else None

    monkeypatch.setattr(codellama, "generate", stand_in)
    order, logprobs = case["suffix_first"], case["logprobs"]
    made = codellama.text_infilling(RECORDED["prefixes"], RECORDED["suffixes"], logprobs=logprobs, suffix_first=order)
    assert made == case["predictions"]
    assert seen == {name: case[name] for name in ("prompt_tokens", "max_gen_len", "stop_token")}


def test_generation_ends_at_the_stop_token_alone(codellama):
    """`stop_token` takes EOS' place: an EOS is then a token like others."""
    prompt, asked = [[1, 300, 301]], {"max_gen_len": 40, "temperature": 0.0}
    (free,), _ = codellama.generate(prompt, **asked, stop_token=899)
    first = free[0]
    assert codellama.generate(prompt, **asked, stop_token=free[5])[0] == [free[: free.index(free[5])]]
    codellama.tokenizer.eos_id = first
    assert codellama.generate(prompt, **asked)[0] == [[]]
    assert codellama.generate(prompt, **asked, stop_token=899)[0] == [free]


def test_infilling_takes_what_its_siblings_take(codellama):
    """Seeds, stop strings and all scores, cut alike, as `generate` gives them; pieces beside them."""
    prefixes, suffixes = ["a = ", "def f(x"], [" + 1", "): pass"]
    asked = {
        "max_gen_len": 12,
        "seeds": [4, 9],
        "top_logprobs": 2,
        "logprobs_of": [[5], [6, 7]],
        "sampling_logprobs": True,
    }
    whole = codellama.text_infilling(prefixes, suffixes, **asked)
    prompts = [infilling_tokens(*pair, codellama.tokenizer) for pair in zip(prefixes, suffixes, strict=True)]
    tokens, logprobs, more = codellama.generate(prompts, stop_token=infilling_ids(codellama.tokenizer).end, **asked)
    for row, answer in enumerate(whole):
        assert answer["tokens"] == token_pieces(tokens[row], codellama.tokenizer) and len(tokens[row]) > 4
        assert answer["logprobs"] == logprobs[row] and all(answer[name] == more[name][row] for name in more)
    alone = codellama.text_infilling(prefixes[1:], suffixes[1:], max_gen_len=12, seeds=[9])
    assert alone[0]["generation"] == whole[1]["generation"]
    stop = whole[0]["generation"][2:4]
    stopped = codellama.text_infilling(prefixes, suffixes, **asked, stop=[[stop], None])
    assert stopped[0]["generation"] == whole[0]["generation"].partition(stop)[0]
    assert stopped[0]["full_text"] == prefixes[0] + stopped[0]["generation"] + suffixes[0]
    assert (stopped[0]["stop_reason"], stopped[1]["stop_reason"]) == (stop, None)
    kept = len(stopped[0]["tokens"])
    assert kept < len(whole[0]["tokens"])
    for name in ("tokens", "logprobs", *more):
        assert stopped[0][name] == whole[0][name][:kept] and stopped[1][name] == whole[1][name]


def test_bad_infilling_calls_are_named(codellama):
    """Lists of different lengths, single texts, marks that are missing, a stop token beyond the vocabulary."""
    with pytest.raises(ValueError, match="got 2 prefixes and 1 suffixes: give as many"):
        codellama.text_infilling(["a", "b"], ["c"])
    with pytest.raises(TypeError, match="prompts must be a list of texts"):
        codellama.text_infilling("a", ["c"])
    with pytest.raises(ValueError, match="stop_token must be from 0 to 899, got 900"):
        codellama.generate([[1]], 4, stop_token=900)


def test_tokenizers_of_code_llama_have_its_members(tokenizer):
    """Ids of the four pieces and the infilling methods; a tokenizer without the pieces has None."""
    assert (tokenizer.prefix_id, tokenizer.suffix_id, tokenizer.middle_id, tokenizer.eot_id) == (3, 4, 5, 6)
    assert tokenizer.decode_infilling(tokenizer.encode_infilling(" x")) == " x"
    assert tokenizer.token_piece(302) == "▁he"
    assert Tokenizer(TINY / "tokenizer.model").eot_id is None
