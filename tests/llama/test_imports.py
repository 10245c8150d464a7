"""The imports of scripts for the `llama` package, with `llama` replaced by `hf_llama_sampling`."""

import pytest

import hf_llama_sampling


@pytest.mark.parametrize(
    "line",
    [
        "from hf_llama_sampling import Llama, Dialog",
        "from hf_llama_sampling import Llama, Dialog, Tokenizer",
        "from hf_llama_sampling.generation import Llama, Dialog, Message, ChatPrediction, sample_top_p, B_INST",
        "from hf_llama_sampling.generation import CompletionPrediction, Role, E_INST, B_SYS, E_SYS, Tokenizer",
        "from hf_llama_sampling.tokenizer import Tokenizer",
        "import hf_llama_sampling.generation, hf_llama_sampling.tokenizer, hf_llama_sampling.model",
    ],
)
def test_what_the_reference_exports_is_here(line):
    """The line runs, and its names are the package's own."""
    names: dict = {}
    exec(line, names)
    for name in ("Llama", "Tokenizer"):
        assert name not in names or names[name] is getattr(hf_llama_sampling, name)


@pytest.mark.parametrize("name", ["ModelArgs", "Transformer"])
@pytest.mark.parametrize("module", ["hf_llama_sampling", "hf_llama_sampling.model", "hf_llama_sampling.generation"])
def test_the_two_model_classes_are_one_sentence(name, module):
    """The import names what to use instead."""
    with pytest.raises(ImportError) as error:
        exec(f"from {module} import {name}")
    said = str(error.value)
    assert said.startswith(f"hf_llama_sampling has no {name}") and "\n" not in said
    assert "Llama.build" in said and "forward(tokens, start_pos)" in said


def test_other_names_are_missing_as_everywhere():
    """A misspelt name is an AttributeError, and `hasattr` says False."""
    assert not hasattr(hf_llama_sampling, "Llamma")
    with pytest.raises(ImportError, match="cannot import name 'Model'"):
        exec("from hf_llama_sampling.model import Model")
