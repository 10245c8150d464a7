"""The examples in the docstrings of the `llama`-compatible API, run on the bundled model."""

import doctest

import pytest
import torch
import transformers

from hf_llama_sampling import Llama, LlamaForCausalLM, Tokenizer, checks, console
from hf_llama_sampling.llama import dialog, meta_params, reference_model
from hf_llama_sampling.llama.tokenizer import TransformersTokenizer
from tests.conftest import PACKAGE, TINY

WITH_EXAMPLES = [Llama.build, Llama.generate, Llama.text_completion, Llama.chat_completion, Llama.encode_dialog]
WITH_EXAMPLES += [Tokenizer.encode, Tokenizer.decode]


def examples_of(thing):
    """The examples in a docstring, or in those of a module or class."""
    return [test for test in doctest.DocTestFinder().find(thing, globs={}) if test.examples]


@pytest.mark.parametrize(
    "thing",
    [Llama, Tokenizer, TransformersTokenizer, dialog, meta_params, reference_model, checks, console],
    ids=lambda thing: thing.__name__,
)
def test_examples_print_what_they_say(thing, tiny_model, monkeypatch):
    """Each `>>>` line gives the output under it."""
    monkeypatch.chdir(PACKAGE.parent)
    tokenizer = Tokenizer(TINY / "tokenizer.model")
    names = {
        "folder": str(TINY),
        "model": tiny_model,
        "tokenizer": tokenizer,
        "llama": Llama(tiny_model, tokenizer),
        "torch": torch,
        "LlamaForCausalLM": LlamaForCausalLM,
        "AutoTokenizer": transformers.AutoTokenizer,
    }
    said: list[str] = []
    for test in examples_of(thing):
        test.globs = names | (vars(thing) if isinstance(thing, type(doctest)) else {thing.__name__: thing})
        test.globs |= {"SimpleNamespace": reference_model.SimpleNamespace}
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("thing", WITH_EXAMPLES, ids=lambda thing: thing.__qualname__)
def test_public_calls_have_an_example(thing):
    """Each shows a call and its output."""
    assert any(example.want for test in examples_of(thing) for example in test.examples)
