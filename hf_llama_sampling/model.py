"""The place of the reference's ``llama.model``: its `ModelArgs` and `Transformer` are refused with the way out.

What this module does not do: it holds no model; a model here is one of transformers.
"""

from typing import Any

from .defaults import no_model_class


def __getattr__(name: str) -> Any:
    if name in ("ModelArgs", "Transformer"):
        raise ImportError(no_model_class(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
