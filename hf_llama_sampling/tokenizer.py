"""The place of the reference's ``llama.tokenizer``, for scripts that import from there.

What this module does not do: it adds nothing to `Tokenizer`, which lives in `llama.tokenizer`.
"""

from .llama.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
