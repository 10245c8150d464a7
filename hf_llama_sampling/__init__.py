"""LLAMA2's generation, exactly, inside Hugging Face transformers."""

from .dialog import Dialog, Message, Role
from .generation import (
    LlamaForCausalLM,
    LlamaGenerateOutput,
    LlamaGenerationMixin,
    LlamaScoreOutput,
    with_llama_generation,
)
from .llama import ChatPrediction, CompletionPrediction, Llama
from .tokenizer import Tokenizer
from .warpers import LlamaSampler, LlamaTemperatureLogitsWarper, LlamaTopPLogitsWarper, sample_top_p

__version__ = "0.1.0"

__all__ = [
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "LlamaForCausalLM",
    "LlamaGenerateOutput",
    "LlamaGenerationMixin",
    "LlamaSampler",
    "LlamaScoreOutput",
    "LlamaTemperatureLogitsWarper",
    "LlamaTopPLogitsWarper",
    "Message",
    "Role",
    "Tokenizer",
    "sample_top_p",
    "with_llama_generation",
]
