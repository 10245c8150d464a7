"""Releases of transformers: the oldest that this package runs on, and a name in which the newer ones differ.

What this module does not do: it looks at no model.
"""

from dataclasses import fields
from typing import Any

import transformers
from packaging.version import Version
from transformers.generation import GenerateDecoderOnlyOutput

OLDEST = "5.23"  # also in pyproject.toml; docs/versions.md says why

# Releases from 5.24 on use the name `cache` in every signature and output, and warn of the older name.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in fields(GenerateDecoderOnlyOutput) if field.name in CACHE_NAMES)


def cache_in(output: Any) -> Any:
    """Return the cache in an output of transformers, under this release's name, or None."""
    return getattr(output, CACHE_NAME, None)


def check_release(version: str = transformers.__version__) -> None:
    """Refuse a release under which some answers would be silently wrong.

    >>> check_release("4.57.6")
    Traceback (most recent call last):
    ImportError: hf_llama_sampling needs transformers 5.23 or newer, got 4.57.6, ...
    """
    if Version(version) < Version(OLDEST):
        raise ImportError(
            f"hf_llama_sampling needs transformers {OLDEST} or newer, got {version}, under which some answers would be "
            f"wrong without a word: pip install 'transformers>={OLDEST}'"
        )
