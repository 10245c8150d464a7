"""Evaluation of language models. Importing it registers `LlamaLM` with lm-evaluation-harness as ``hf-llama``."""

from typing import Any

try:
    from .harness import LlamaLM as LlamaLM
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise

__all__ = ["LlamaLM"]


def __getattr__(name: str) -> Any:
    if name == "LlamaLM":
        raise ImportError("LlamaLM needs lm-evaluation-harness: pip install lm_eval (this package's extra lm-eval)")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
