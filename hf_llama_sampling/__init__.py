"""LLAMA2's generation, exactly, inside Hugging Face transformers."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

TEMPERATURE = 0.6  # the reference's defaults, written once
TOP_P = 0.9

if TYPE_CHECKING:
    from .dialog import Dialog as Dialog
    from .dialog import Message as Message
    from .dialog import Role as Role
    from .generation import LlamaForCausalLM as LlamaForCausalLM
    from .generation import LlamaGenerateOutput as LlamaGenerateOutput
    from .generation import LlamaGenerationMixin as LlamaGenerationMixin
    from .generation import LlamaScoreOutput as LlamaScoreOutput
    from .generation import with_llama_generation as with_llama_generation
    from .llama import ChatPrediction as ChatPrediction
    from .llama import CompletionPrediction as CompletionPrediction
    from .llama import Llama as Llama
    from .tokenizer import Tokenizer as Tokenizer
    from .warpers import LlamaSampler as LlamaSampler
    from .warpers import LlamaTemperatureLogitsWarper as LlamaTemperatureLogitsWarper
    from .warpers import LlamaTopPLogitsWarper as LlamaTopPLogitsWarper
    from .warpers import sample_top_p as sample_top_p

_HOMES = {
    "dialog": ["Dialog", "Message", "Role"],
    "generation": [
        "LlamaForCausalLM",
        "LlamaGenerateOutput",
        "LlamaGenerationMixin",
        "LlamaScoreOutput",
        "with_llama_generation",
    ],
    "llama": ["ChatPrediction", "CompletionPrediction", "Llama"],
    "tokenizer": ["Tokenizer"],
    "warpers": ["LlamaSampler", "LlamaTemperatureLogitsWarper", "LlamaTopPLogitsWarper", "sample_top_p"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name's module when it is asked for: torch and transformers take seconds, and `--help` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
