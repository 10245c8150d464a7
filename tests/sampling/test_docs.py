"""The examples in the docstrings of this package print what they say."""

import doctest
import importlib

import pytest
import torch

from hf_llama_sampling import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper, sample_top_p
from hf_llama_sampling.sampling.sampler import TokenSampler
from hf_llama_sampling.sampling.settings import SamplingSettings

MODULES = ["rule", "fast_path", "philox", "streams", "settings", "sampler", "processors"]
PUBLIC = [
    LlamaSampler,
    LlamaTemperatureLogitsWarper,
    LlamaTopPLogitsWarper,
    sample_top_p,
    SamplingSettings,
    TokenSampler,
]


@pytest.mark.parametrize("module", [*(f"sampling.{name}" for name in MODULES), "checks"])
def test_examples_print_what_they_say(module):
    """Run as written, with torch at hand."""
    home = importlib.import_module(f"hf_llama_sampling.{module}")
    assert doctest.testmod(home, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_public_docstrings_have_an_example(thing):
    """With its output."""
    examples = doctest.DocTestParser().get_examples(thing.__doc__)
    assert any(example.want for example in examples)


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_do_not_do(module):
    """In their docstring."""
    assert "this module does not do" in importlib.import_module(f"hf_llama_sampling.sampling.{module}").__doc__.replace(
        "\n", " "
    )
