"""The names that a script written for the reference's `llama.generation` imports."""

import subprocess
import sys

import pytest

import hf_llama_sampling
from hf_llama_sampling import generation


def test_the_references_module_of_the_same_name_may_be_replaced():
    """Every name that `llama.generation` exports is here, and is the package's own."""
    from hf_llama_sampling.generation import (
        B_INST,
        B_SYS,
        E_INST,
        E_SYS,
        SPECIAL_TAGS,
        UNSAFE_ERROR,
        ChatPrediction,
        CompletionPrediction,
        Dialog,
        Llama,
        Message,
        Role,
        sample_top_p,
    )

    assert (B_INST, E_INST, B_SYS, E_SYS) == ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    assert list(SPECIAL_TAGS) == [B_INST, E_INST, B_SYS, E_SYS]
    assert UNSAFE_ERROR == "Error: special tags are not allowed as part of the prompt."
    for value in (Llama, Dialog, Message, Role, ChatPrediction, CompletionPrediction, sample_top_p):
        assert value in [getattr(hf_llama_sampling, name) for name in hf_llama_sampling.__all__]
    assert {"Llama", "sample_top_p", "UNSAFE_ERROR"} <= set(dir(generation))


def test_other_names_are_refused_as_in_any_module():
    """AttributeError and ImportError, not a surprise."""
    with pytest.raises(AttributeError, match="has no attribute 'Llamma'"):
        _ = generation.Llamma
    with pytest.raises(ImportError):
        from hf_llama_sampling.generation import sample_top_k  # noqa: F401


@pytest.mark.launches
def test_the_package_imports_nothing_above_it_until_asked():
    """`generation` lies below `llama`: importing it loads neither `llama` nor torch."""
    loaded = "{'torch', 'hf_llama_sampling.llama'} & set(sys.modules)"
    code = f"import sys, hf_llama_sampling.generation; sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
