"""Caches of a prefix, handed to several continuations: rows repeated, taken apart and cut.

Only caches are shared whose layers grow by concatenation, so that a continuation leaves the prefix's tensors as they
are: transformers' `DynamicCache`, with or without sliding windows. All others (static, quantized, offloaded, recurrent
states, a model's own class) are left alone. What this module does not do: it decides nothing about prompts.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers.cache_utils as cache_utils
from torch import Tensor
from transformers import DynamicCache

# `torch.cat` makes their new keys and values, so old ones may be shared. Not all releases of transformers have all.
_GROWING = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)

LayerStates = list[tuple[Tensor, Tensor] | None]
"""Keys and values of one row, (1, heads, T, size) each, of every layer; None for a layer that has none."""


def can_be_shared(cache: Any) -> bool:
    """Whether continuations of a prefix may share its cache."""
    return (
        type(cache) is DynamicCache
        and not getattr(cache, "offloading", False)
        and len(cache.layers) > 0
        and all(type(layer) in _GROWING for layer in cache.layers)
    )


def repeat_rows(cache: Any, rows: int) -> Any:
    """A cache (1 row) for so many continuations: views of the same tensors, which `update` does not write to."""
    return _with_tensors(cache, lambda states: states.expand(rows, *states.shape[1:]))


def take_row(cache: Any, row: int) -> Any:
    """One row of a cache as a cache: views of its tensors."""
    return _with_tensors(cache, lambda states: states[row : row + 1])


def select_rows(cache: Any, rows: Tensor) -> Any:
    """A cache of these rows of a cache, copied: a row may be taken several times. `rows` is (N,).

    Recurrent states are copied too, where a cache has any.
    """
    if can_be_shared(cache):
        return _with_tensors(cache, lambda states: states.index_select(0, rows.to(states.device)))
    cache.reorder_cache(rows)
    return cache


def lay_out(cache: Any, places: Tensor, config: Any) -> Any:
    """A cache for rows that hold the columns of a prefix behind padding of their own.

    Args:
        cache: the prefix's (1 row), without windows.
        places: (B, T), for each row and column the column of the prefix that stands there.
        config: the model's; layers with a sliding window take what it covers.
    """
    laid_out = DynamicCache(config=config)
    straight = bool((places == places[:1]).all())
    for index, layer in enumerate(cache.layers):
        keys, values = (
            states.expand(len(places), *states.shape[1:])
            if straight
            else states[0][:, places.to(states.device)].transpose(0, 1)
            for states in (layer.keys, layer.values)
        )  # (B, heads, T, size)
        laid_out.update(keys, values, index)
    return laid_out


def row_states(cache: Any, row: int, span: slice) -> LayerStates:
    """A row's keys and values in some columns: views of a cache's tensors, which `update` does not write to."""
    kept = [_tensors(layer) for layer in cache.layers]
    return [(pair[0][row : row + 1, :, span], pair[1][row : row + 1, :, span]) if pair else None for pair in kept]


def join_rows(rows: Sequence[LayerStates], offsets: Sequence[int], columns: int, config: Any) -> Any:
    """A cache of so many columns, (len(rows), heads, columns, size) a layer, of texts that were read one by one.

    Args:
        rows: each row's states, those of the columns that it fills at least.
        offsets: the column in which each row's text begins; before it stand zeros, which a mask must hide.
        columns: T.
        config: the model's; layers with a sliding window take what it covers.
    """
    joined = DynamicCache(config=config)
    for index, layer in enumerate(zip(*rows, strict=True)):
        pairs = [pair for pair in layer if pair is not None]
        if pairs:
            keys, values = (
                [_placed(pair[which], offset, columns) for pair, offset in zip(pairs, offsets, strict=True)]
                for which in (0, 1)
            )
            several = len(rows) > 1
            joined.update(*(torch.cat(parts) if several else parts[0] for parts in (keys, values)), index)
    return joined


def _placed(states: Tensor, offset: int, columns: int) -> Tensor:
    """(1, heads, columns, size): states (1, heads, T, size) from a column on."""
    shown = states[..., : max(0, columns - offset), :]
    missing = columns - shown.shape[-2]
    return torch.nn.functional.pad(shown, (0, 0, missing, 0)) if missing else shown


def drop_last(cache: Any, columns: int) -> Any:
    """A cache without its last columns; see `can_drop`."""
    shorter = _with_tensors(cache, lambda states: states)
    if columns:
        shorter.crop(-columns)
    return shorter


def can_drop(cache: Any) -> bool:
    """Whether the last columns can be dropped: a sliding window that is full has lost those that would come back."""
    return all(
        not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window
        for layer in cache.layers
    )


def window_of(cache: Any) -> int | None:
    """The shortest sliding window of a cache's layers, or None where there is none."""
    windows = [layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(windows, default=None)


def bytes_per_column(cache: Any) -> int:
    """What one column of one row takes, rounded up, as long as no sliding window is full."""
    tensors = [states for layer in cache.layers for states in _tensors(layer)]
    return sum(-(-states.numel() * states.element_size() // (states.shape[0] * states.shape[-2])) for states in tensors)


def _with_tensors(cache: Any, change: Any) -> Any:
    """A cache of the same kind with its tensors changed; the given one stays as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        if _tensors(layer):
            layer.keys, layer.values = change(layer.keys), change(layer.values)
    return other


def _tensors(layer: Any) -> list[Tensor]:
    keys = getattr(layer, "keys", None)
    return [keys, layer.values] if isinstance(keys, Tensor) and keys.dim() > 1 and keys.numel() else []
