"""Evaluation of language models: a model of lm-evaluation-harness. The harness is imported when it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .harness import LlamaLM as LlamaLM

__all__ = ["LlamaLM"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".harness", __name__), name)
