"""Code Llama's infilling format against answers recorded from its own code."""

import json

import pytest

from hf_llama_sampling import Tokenizer
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
