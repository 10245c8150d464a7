"""Read a batch: convert prompts and dialogs, in any ordered container, to lists.

Lists, tuples, NumPy arrays, columns of a table, generators and the values of a dictionary are taken; a single prompt, a
set and a whole table are refused. What this module does not do: it encodes nothing, and does not look at token ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


def as_rows(prompts: Any) -> Any:
    """Convert generators, columns and dict values to lists, so that prompts can be counted and read twice."""
    if isinstance(prompts, Sequence | torch.Tensor | Mapping | str) or not isinstance(prompts, Iterable):
        rows = prompts
    else:
        _refuse_unordered(prompts, "prompts")
        rows = list(prompts)
    if isinstance(rows, torch.Tensor) or not isinstance(rows, Sequence) or isinstance(rows, str):
        return rows
    return [list(row) if isinstance(row, Iterable) and not hasattr(row, "__len__") else row for row in rows]


def as_texts(prompts: Any) -> list[str]:
    """Convert prompts to a list of texts."""
    given = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(given, Mapping):
        raise TypeError("prompts must be a list of texts, and this is a dictionary: give its values()")
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"prompts must be a list of texts, got {type(given).__name__}: wrap it as [prompt]")
    _refuse_unordered(given, "prompts")
    texts = list(given)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"prompts must be texts, got {type(text).__name__} for row {row}: give its text")
    return [str(text) for text in texts]


def as_dialogs(dialogs: Any) -> list[Any]:
    """Convert dialogs to a list of lists of messages."""
    if isinstance(dialogs, str | bytes | Mapping) or not isinstance(dialogs, Iterable):
        raise TypeError("dialogs must be a list of dialogs, and this is a single one or none: wrap it as [dialog]")
    _refuse_unordered(dialogs, "dialogs")
    listed = list(dialogs)
    if listed and isinstance(listed[0], Mapping):
        raise TypeError("dialogs must be a list of dialogs, and this is a single one or none: wrap it as [dialog]")
    kept = (Sequence, Mapping, str, bytes)
    return [list(item) if isinstance(item, Iterable) and not isinstance(item, kept) else item for item in listed]


def _refuse_unordered(given: Any, name: str) -> None:
    if isinstance(given, set | frozenset):
        raise TypeError(f"{name} must have an order, which the answers follow, and a set has none: give a list")
    if hasattr(given, "columns"):
        raise TypeError(f"{name} must be one list, and this is a table: give one of its columns")
