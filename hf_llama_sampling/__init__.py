"""LLAMA2's generation, exactly, inside Hugging Face transformers."""

import importlib
from typing import TYPE_CHECKING, Any

from .defaults import __version__ as __version__
from .defaults import no_model_class as _no_model_class

if TYPE_CHECKING:
    from .generation.continuations import LlamaContinuationOutput as LlamaContinuationOutput
    from .generation.events import TokenEvent as TokenEvent
    from .generation.mixin import LlamaForCausalLM as LlamaForCausalLM
    from .generation.mixin import LlamaGenerationMixin as LlamaGenerationMixin
    from .generation.mixin import with_llama_generation as with_llama_generation
    from .generation.outputs import LlamaGenerateOutput as LlamaGenerateOutput
    from .generation.outputs import LlamaScoreOutput as LlamaScoreOutput
    from .generation.prompt_cache import PromptCache as PromptCache
    from .llama.dialog import Dialog as Dialog
    from .llama.dialog import Message as Message
    from .llama.dialog import Role as Role
    from .llama.infilling import InfillingPrediction as InfillingPrediction
    from .llama.llama import ChatPrediction as ChatPrediction
    from .llama.llama import CompletionPrediction as CompletionPrediction
    from .llama.llama import Llama as Llama
    from .llama.tokenizer import Tokenizer as Tokenizer
    from .sampling.processors import LlamaSampler as LlamaSampler
    from .sampling.processors import LlamaTemperatureLogitsWarper as LlamaTemperatureLogitsWarper
    from .sampling.processors import LlamaTopPLogitsWarper as LlamaTopPLogitsWarper
    from .sampling.processors import sample_top_p as sample_top_p

_HOMES = {
    "llama.dialog": ["Dialog", "Message", "Role"],
    "generation.continuations": ["LlamaContinuationOutput"],
    "generation.events": ["TokenEvent"],
    "generation.mixin": ["LlamaForCausalLM", "LlamaGenerationMixin", "with_llama_generation"],
    "generation.outputs": ["LlamaGenerateOutput", "LlamaScoreOutput"],
    "generation.prompt_cache": ["PromptCache"],
    "llama.infilling": ["InfillingPrediction"],
    "llama.llama": ["ChatPrediction", "CompletionPrediction", "Llama"],
    "llama.tokenizer": ["Tokenizer"],
    "sampling.processors": ["LlamaSampler", "LlamaTemperatureLogitsWarper", "LlamaTopPLogitsWarper", "sample_top_p"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name's module when it is asked for: torch and transformers take seconds, and `--help` needs neither."""
    if name in ("ModelArgs", "Transformer"):  # an AttributeError's sentence would be lost in `from ... import`
        raise ImportError(_no_model_class(name))
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
