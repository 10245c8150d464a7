"""`generate` and scoring on token ids, on transformers' public API.

A script written for ``from llama.generation import Llama, Dialog`` changes `llama` to `hf_llama_sampling`: the names
that the reference's module of the same name exports are found here too, and are imported when they are asked for.
"""

import importlib
from typing import Any

from ..defaults import no_model_class

# Where the names of the reference's `llama/generation.py` live here: above this package, or below it.
_HOMES = {
    "llama.llama": ("ChatPrediction", "CompletionPrediction", "Llama"),
    "llama.tokenizer": ("Tokenizer",),
    "llama.dialog": ("Dialog", "Message", "Role", "B_INST", "E_INST", "B_SYS", "E_SYS", "SPECIAL_TAGS", "UNSAFE_ERROR"),
    "sampling.processors": ("sample_top_p",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import one of the reference's names from the module where it lives."""
    if name in ("ModelArgs", "Transformer"):  # which the reference's module imports
        raise ImportError(no_model_class(name))
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = __name__.rpartition(".")[0]
    return getattr(importlib.import_module(f"{package}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
