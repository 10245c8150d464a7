"""The folder in the Hub's convention for custom generation methods, run by transformers' own `generate`."""

import inspect
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_llama_sampling import LlamaGenerationMixin
from tests.conftest import HERE, PACKAGE, TINY
from tests.docs.test_blocks import blocks_of, check_printed, run_python
from tests.generation.helpers import close

EXAMPLES = HERE.parent / "examples"
FOLDER = str(EXAMPLES / "custom_generate")


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def test_transformers_runs_it(plain, tiny_model, tiny_tokenizer):
    """Same tokens and logprobs as our class; a padded batch too."""
    tiny_tokenizer.pad_token = tiny_tokenizer.pad_token or tiny_tokenizer.eos_token
    inputs = tiny_tokenizer(["ROMEO:", "The king is here and"], return_tensors="pt", padding=True, padding_side="left")
    asked = {"max_gen_len": 8, "seeds": 3, "logprobs": True, "echo": True}
    made = plain.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        custom_generate=FOLDER,
        trust_remote_code=True,
        **asked,
    )
    ours = tiny_model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **asked)
    assert made.tokens == ours.tokens
    close(made.logprobs, ours.logprobs)


def test_a_tensor_comes_back_where_nothing_more_is_asked(plain, tiny_model):
    """transformers' convention, and bad values are refused by name there too."""
    ids = torch.tensor([[1, 300, 301]])
    made = plain.generate(ids, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=4, temperature=0)
    assert torch.equal(made, tiny_model.generate(ids, max_gen_len=4, temperature=0))
    with pytest.raises(ValueError, match="top_p must lie in"):
        plain.generate(ids, custom_generate=FOLDER, trust_remote_code=True, max_gen_len=4, top_p=2)


def test_its_card_runs_as_shown(tmp_path, monkeypatch):
    """The block of the model card, in a folder that holds what a checkout does."""
    (tmp_path / "hf_llama_sampling").symlink_to(PACKAGE)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks_of(EXAMPLES / "custom_generate" / "README.md")
    check_printed(block.shown, run_python(block, {"__name__": "__main__"}, "the card"), "the card")


def test_its_arguments_and_defaults_are_ours():
    """Each argument that the card's table names is one of our generate's."""
    card = (EXAMPLES / "custom_generate" / "README.md").read_text()
    named = [name for row in re.findall(r"^\| (`.*?`) \|", card, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert len(named) > 6 and set(named) <= set(inspect.signature(LlamaGenerationMixin.generate).parameters)
