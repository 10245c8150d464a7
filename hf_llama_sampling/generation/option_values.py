"""Check the values of options that transformers' processors and loop read, before anything is forwarded.

transformers makes some of its checks only in a step, and accepts some meaningless values. Values that can mean only one
thing are converted: 2 for 2.0, tuples and arrays for lists. What this module does not do: it knows no prompts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import CompileConfig
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from ..checks import check_choice, check_int, to_list, to_scalar

Check = Callable[[str, Any, int], Any]


def check_option_values(options: dict[str, Any], vocab_size: int) -> None:
    """Check the options of a call, and put their values into the form that transformers takes.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type; the option is named.
    """
    for name, check in _CHECKS.items():
        if options.get(name) is not None:
            options[name] = check(name, options[name], vocab_size)
    if options.get("cache_config") is not None and options.get("cache_implementation") is None:
        raise ValueError("cache_config says how a cache is made, and no cache_implementation is given: give both")


def check_allowed(allowed: Any, vocab_size: int, where: str) -> list[int]:
    """Convert the answer of `prefix_allowed_tokens_fn` to a list of ids: one id, or several in any container."""
    listed = list(allowed) if isinstance(allowed, (set, frozenset)) else to_list(allowed)
    listed = [allowed] if listed is None else listed
    nested = [to_list(item) for item in listed]
    flat = [token for item, inner in zip(listed, nested, strict=True) for token in ([item] if inner is None else inner)]
    return [
        check_int("a token of prefix_allowed_tokens_fn", t, least=0, most=vocab_size - 1, where=where) for t in flat
    ]


def _number(name: str, value: Any, above: float) -> float:
    number = to_scalar(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not above < number < math.inf:
        raise ValueError(f"{name} must be a finite number{' above 0' if above == 0 else ''}, got {value!r}")
    return float(number)


def _positive(name: str, value: Any, _: int) -> float:
    return _number(name, value, above=0)


def _finite(name: str, value: Any, _: int) -> float:
    return _number(name, value, above=-math.inf)


def _count(name: str, value: Any, _: int) -> int:
    return check_int(name, value, least=0)


def _size(name: str, value: Any, _: int) -> int:
    return check_int(name, value, least=1)


def _mark(name: str, value: Any, _: int) -> int:
    """Check a special token's id; old checkpoints have -1, and an added pad token may exceed the model's ids."""
    return check_int(name, value, least=-1)


def _id(name: str, value: Any, vocab_size: int) -> int:
    return check_int(name, value, least=0, most=vocab_size - 1)


def _ids(name: str, value: Any, vocab_size: int) -> list[int]:
    listed = to_list(value)
    if listed is None:
        raise TypeError(f"{name} must be a list of token ids, got {value!r}: wrap a single one as [id]")
    return [_id(f"a token of {name}", token, vocab_size) for token in listed]


def _id_or_ids(name: str, value: Any, vocab_size: int) -> int | list[int]:
    if to_list(value) is None:
        return _id(name, value, vocab_size)
    return _some(name, _ids(name, value, vocab_size))


def _some(name: str, values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError(f"{name} must hold at least one token id, got an empty list: leave it out")
    return values


def _texts_of_ids(name: str, value: Any, vocab_size: int) -> list[list[int]]:
    listed = to_list(value)
    if listed is None or any(to_list(ids) is None for ids in listed):
        raise TypeError(f"{name} must be a list of lists of token ids, got {value!r}: wrap a single one as [[id]]")
    return [_some(f"each list of {name}", _ids(name, ids, vocab_size)) for ids in listed]


def _biases(name: str, value: Any, vocab_size: int) -> dict[tuple[int, ...], float]:
    pairs = list(value.items()) if isinstance(value, Mapping) else [to_list(pair) for pair in to_list(value) or []]
    if not pairs or any(pair is None or len(pair) != 2 or to_list(pair[0]) is None for pair in pairs):
        raise TypeError(
            f"{name} must map tuples of token ids to numbers, got {value!r}: give {{(id, ...): bias}}, or leave it out"
        )
    biases = {}
    for ids, bias in pairs:  # type: ignore[misc]  # no pair is None
        key = tuple(_some(f"each sequence of {name}", _ids(name, ids, vocab_size)))
        biases[key] = -math.inf if to_scalar(bias) == -math.inf else _finite(f"a bias of {name}", bias, vocab_size)
    return biases


def _decay(name: str, value: Any, _: int) -> tuple[int, float]:
    pair = to_list(value)
    if pair is None or len(pair) != 2:
        raise TypeError(f"{name} must be a pair (first token, factor), got {value!r}")
    return check_int(f"the first token of {name}", pair[0], least=0), _number(f"the factor of {name}", pair[1], above=0)


def _seconds(name: str, value: Any, _: int) -> float:
    return _number(name, value, above=0)


def _cache_kind(name: str, value: Any, _: int) -> str:
    """Check the name of a cache; transformers' own offloaded ones fail where there is no accelerator."""
    check_choice(name, value, sorted(ALL_CACHE_IMPLEMENTATIONS))
    if "offloaded" in value and not torch.accelerator.is_available():
        raise ValueError(f"{name}={value!r} moves a GPU's cache to the CPU, and torch finds no GPU here: leave it out")
    return str(value)


def _cache_settings(name: str, value: Any, _: int) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of the cache's settings, got {value!r}: leave it out for the defaults")
    return dict(value)


def _compile_config(name: str, value: Any, _: int) -> CompileConfig:
    if not isinstance(value, CompileConfig):
        raise TypeError(f"{name} must be a CompileConfig of transformers, got {value!r}: make one, or leave it out")
    return value


def _strings(name: str, value: Any, _: int) -> list[str]:
    listed = [value] if isinstance(value, str) else to_list(value)
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise TypeError(f"{name} must be a text or a list of texts, got {value!r}")
    if "" in listed:
        raise ValueError(f"each of {name} must hold at least one character, got an empty one: drop it")
    return listed


_CHECKS: dict[str, Check] = {
    "repetition_penalty": _positive,
    "encoder_repetition_penalty": _positive,
    "guidance_scale": _finite,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "min_length": _count,
    "min_new_tokens": _count,
    "bad_words_ids": _texts_of_ids,
    "sequence_bias": _biases,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _id_or_ids,
    "exponential_decay_length_penalty": _decay,
    "pad_token_id": _mark,
    "bos_token_id": _mark,
    "stop_strings": _strings,
    "max_time": _seconds,
    "prefill_chunk_size": _size,
    "max_cache_len": _size,
    "cache_implementation": _cache_kind,
    "cache_config": _cache_settings,
    "compile_config": _compile_config,
}
