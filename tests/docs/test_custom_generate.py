"""The folder in the Hub's convention for custom generation methods, run by transformers' own `generate`."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import HERE, TINY

FOLDER = str(HERE.parent / "examples" / "custom_generate")


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
    assert made.tokens == ours.tokens and made.logprobs == ours.logprobs


def test_a_tensor_comes_back_where_nothing_more_is_asked(plain, tiny_model):
    """transformers' convention, and bad values are refused by name there too."""
    ids = torch.tensor([[1, 300, 301]])
    made = plain.generate(ids, custom_generate=FOLDER, trust_remote_code=True, max_new_tokens=4, temperature=0)
    assert torch.equal(made, tiny_model.generate(ids, max_gen_len=4, temperature=0))
    with pytest.raises(ValueError, match="top_p must lie in"):
        plain.generate(ids, custom_generate=FOLDER, trust_remote_code=True, max_gen_len=4, top_p=2)
