"""Share a prefix's cache among continuations: repeat, select, lay out and cut its rows.

Only caches whose layers grow by concatenation can be shared, since a continuation must leave the prefix's tensors
unchanged: transformers' `DynamicCache`, with or without sliding windows. Others (static, quantized, offloaded,
recurrent states, a model's own class) are not shared. What this module does not do: it decides nothing about prompts.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers.cache_utils as cache_utils
from torch import Tensor
from transformers import DynamicCache

# These layers make new keys and values with `torch.cat`, so old ones may be shared. Releases differ in which exist.
_GROWING = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)

# These write new keys into columns of fixed tensors; one with a sliding window keeps the order until it is full.
_STATIC = tuple(
    getattr(cache_utils, name) for name in ("StaticLayer", "StaticSlidingWindowLayer") if hasattr(cache_utils, name)
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
    """Expand a cache of 1 row to `rows` rows: views of the same tensors, which `update` does not write to."""
    return _with_tensors(cache, lambda states: states.expand(rows, *states.shape[1:]))


def take_row(cache: Any, row: int) -> Any:
    """Return one row of a cache as a cache: views of its tensors."""
    return _with_tensors(cache, lambda states: states[row : row + 1])


def select_rows(cache: Any, rows: Tensor) -> Any:
    """Select rows (N,) of a cache, each as often as it is named; a cache that cannot be shared is changed in place."""
    if can_be_shared(cache):
        return _with_tensors(cache, lambda states: states.index_select(0, rows.to(states.device)))
    cache.reorder_cache(rows)
    return cache


def lay_out(cache: Any, places: Tensor, config: Any) -> Any:
    """Lay out a prefix's cache behind the padding of each row of a batch.

    Args:
        cache: the prefix's (1 row), without windows.
        places: (B, T), for each row and column, the prefix's column to put there.
        config: the model's; layers with a sliding window keep the columns that it covers.
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
    """Return a row's keys and values in some columns: views, which `update` does not write to."""
    kept = [_tensors(layer) for layer in cache.layers]
    return [(pair[0][row : row + 1, :, span], pair[1][row : row + 1, :, span]) if pair else None for pair in kept]


def join_rows(rows: Sequence[LayerStates], offsets: Sequence[int], columns: int, config: Any) -> Any:
    """Join texts that were prefilled one by one to a cache of (len(rows), heads, columns, size) a layer.

    Args:
        rows: each row's states, of at least the columns that it fills.
        offsets: the column in which each row's text begins; a mask must hide the zeros in the columns before it.
        columns: T.
        config: the model's; layers with a sliding window keep the columns that it covers.
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
    """Shift states (1, heads, T, size) to start at column `offset`; return (1, heads, columns, size)."""
    shown = states[..., : max(0, columns - offset), :]
    missing = columns - shown.shape[-2]
    return torch.nn.functional.pad(shown, (0, 0, missing, 0)) if missing else shown


def drop_last(cache: Any, columns: int) -> Any:
    """Return a cache without its last columns; see `can_drop`."""
    shorter = _with_tensors(cache, lambda states: states)
    if columns:
        shorter.crop(-columns)
    return shorter


def can_drop(cache: Any) -> bool:
    """Whether the last columns can be dropped. Not if a sliding window is full: it has lost the columns to restore."""
    return all(
        not getattr(layer, "is_sliding", False) or layer.get_seq_length() < layer.sliding_window
        for layer in cache.layers
    )


def window_of(cache: Any) -> int | None:
    """Return the shortest sliding window of a cache's layers, or None if there is none."""
    windows = [layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)]
    return min(windows, default=None)


def rows_of(cache: Any) -> int | None:
    """Return how many rows a cache holds, or None if it holds nothing yet."""
    return next((len(tensors[0]) for tensors in map(_tensors, getattr(cache, "layers", ())) if tensors), None)


def room_of(cache: Any) -> int | None:
    """Return how many columns a static cache has room for, or None if there is no such limit."""
    layers = (layer for layer in getattr(cache, "layers", ()) if not getattr(layer, "is_sliding", False))
    return min((layer.max_cache_len for layer in layers if hasattr(layer, "max_cache_len")), default=None)


def keys_of(cache: Any, index: int, columns: int) -> Tensor | None:
    """Return what a layer still holds of the keys of the first `columns` columns: (B, heads, T, size), the last T.

    None if it does not hold them as they were computed, in their order.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[index] if index < len(layers) else None
    if layer is None or not _tensors(layer):
        return None
    keys: Tensor = layer.keys
    if type(layer) in _GROWING:
        kept = min(keys.shape[2], columns)
        return keys[:, :, keys.shape[2] - kept :]
    return keys[:, :, :columns] if type(layer) in _STATIC and columns <= keys.shape[2] else None


def bytes_per_column(cache: Any) -> int:
    """Compute the bytes of one column of one row, rounded up, if no sliding window is full."""
    tensors = [states for layer in cache.layers for states in _tensors(layer)]
    return sum(-(-states.numel() * states.element_size() // (states.shape[0] * states.shape[-2])) for states in tensors)


def _with_tensors(cache: Any, change: Any) -> Any:
    """Copy a cache with `change` applied to its tensors; the given cache is not changed."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        if _tensors(layer):
            layer.keys, layer.values = change(layer.keys), change(layer.values)
    return other


def _tensors(layer: Any) -> list[Tensor]:
    keys = getattr(layer, "keys", None)
    return [keys, layer.values] if isinstance(keys, Tensor) and keys.dim() > 1 and keys.numel() else []
