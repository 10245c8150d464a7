"""Read prompts: turn lists, arrays or tensors of token ids into lists of ints, one per row, without padding.

What this module does not do: it sees no text, and never takes a token id for padding.
"""

import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_int, first_not_none, to_list, to_scalar


def read_prompts(
    inputs: Any, attention_mask: Any, vocab_size: int, *, pad_id: int | None = None, eos_ids: Collection[int] = ()
) -> list[list[int]]:
    """Read prompts as lists of ids, without padding.

    Args:
        inputs: lists of token ids in any ordered container, a tensor or an array (B, T), or a tokenizer's output.
        attention_mask: 1 for tokens and 0 for padding on either side, in the same form.
        vocab_size: ids must lie below it.
        pad_id: the pad id that the call or the checkpoint names, if any.
        eos_ids: the ids that end a text.

    Raises:
        ValueError: no prompt, an empty one, an id outside the vocabulary, a bad mask, or apparent padding in a tensor
            without a mask.
        TypeError: text, or something that holds no token ids.

    >>> read_prompts(torch.tensor([[0, 1, 5], [1, 6, 7]]), [[0, 1, 1], [1, 1, 1]], 32)
    [[1, 5], [1, 6, 7]]
    """
    if inputs is None:
        raise ValueError(
            "generate needs prompts: lists of token ids, or a tensor of shape (B, T) with its attention_mask"
        )
    if isinstance(inputs, Mapping) and "input_ids" in inputs:
        for name in inputs:
            if name not in ("input_ids", "attention_mask") and not _says_nothing(name, inputs[name]):
                raise ValueError(
                    f"a batch given as one object may hold input_ids and attention_mask alone, and this holds {name} "
                    "too: pass it to generate as **batch, or without it"
                )
        inputs, attention_mask = inputs["input_ids"], first_not_none(attention_mask, inputs.get("attention_mask"))
    tensor = _as_tensor(inputs)
    if tensor is not None:
        prompts = _rows_of_tensor(tensor, attention_mask)
        if attention_mask is None:
            _refuse_padding(prompts, pad_id, eos_ids)
    else:
        prompts = _rows_of_lists(inputs, attention_mask)
    _check_prompts(prompts, vocab_size)
    return prompts


def columns_of(inputs: Any) -> int:
    """Return how many columns the prompts took as they were given, padding included; 0 of what can be read only once.

    >>> columns_of(torch.tensor([[0, 0, 1, 5]])), columns_of([[1, 5], [1, 6, 7]])
    (4, 3)
    """
    given = inputs["input_ids"] if isinstance(inputs, Mapping) and "input_ids" in inputs else inputs
    tensor = _as_tensor(given)
    if tensor is not None:
        return tensor.shape[1]
    return max((len(to_list(row) or []) for row in to_list(given) or []), default=0)


def _says_nothing(name: str, values: Any) -> bool:
    """Whether these are token types that are all 0, as for most texts."""
    return name.endswith("token_type_ids") and not any(any(to_list(row) or [True]) for row in to_list(values) or [[]])


def _as_tensor(inputs: Any) -> Tensor | None:
    """Convert a tensor or an array of numbers to a tensor; return None for anything else."""
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc" and inputs.ndim != 1:
        # A copy, since torch takes neither another byte order nor strides below 0, and warns of what is read-only.
        return torch.from_numpy(np.array(inputs, dtype=inputs.dtype.newbyteorder("=")))
    return None


def _rows_of_lists(inputs: Any, mask: Any) -> list[list[int]]:
    """Read the rows of a batch that is not a tensor; a mask beside it must have a value for each token."""
    if isinstance(inputs, str | bytes):
        raise TypeError("prompts must be token ids, got text: encode it with the tokenizer first")
    listed = None if hasattr(inputs, "columns") else to_list(inputs)  # a table's rows are not its elements
    if listed is None:
        raise TypeError(
            f"prompts must be lists of token ids or a tensor of shape (B, T), got {type(inputs).__name__}: "
            "pass tokenizer(...)['input_ids'] and its attention_mask"
        )
    if any(isinstance(row, str | bytes) for row in listed):
        raise TypeError("prompts must be token ids, got text: encode it with the tokenizer first")
    prompts = [_row_of_list(row, prompt) for row, prompt in enumerate(listed)]
    if mask is None:
        return prompts
    masks = [to_list(row) for row in to_list(mask) or []]
    if [None if row is None else len(row) for row in masks] != list(map(len, prompts)):
        raise ValueError(
            "attention_mask beside prompts given as lists must have one value per token, and this one has not: drop "
            "it, since lists carry their own lengths, or pass both as the tokenizer gave them"
        )
    return [_without_padding(row, prompt, masks[row] or []) for row, prompt in enumerate(prompts)]


def _refuse_padding(prompts: list[list[int]], pad_id: int | None, eos_ids: Collection[int]) -> None:
    """Refuse rows of a tensor that begin or end with the pad id: without a mask it may be padding or text.

    transformers takes it for padding unless it is also an EOS id; then it only warns, and so does this function.
    """
    if pad_id is None:
        return
    found = [row for row, prompt in enumerate(prompts) if pad_id in prompt[:1] + prompt[-1:]]
    if not found:
        return
    if pad_id not in eos_ids:
        raise ValueError(
            f"a tensor of prompts that is padded needs its attention_mask, and row {found[0]} begins or ends with the "
            f"pad id {pad_id}: pass attention_mask (all ones if it is text), or lists of ids"
        )
    if len(prompts) > 1:
        warnings.warn(
            f"row {found[0]} begins or ends with {pad_id}, which is both the pad id and an EOS id, and is taken as "
            "text: pass attention_mask if it is padding",
            stacklevel=6,
        )


def _check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    """Refuse an empty batch, an empty prompt, and ids that the model cannot embed."""
    if not prompts:
        raise ValueError("a batch must hold at least one prompt, got none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"a prompt must hold at least one token, but row {row} is empty: start it with BOS")
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"token ids must lie in [0, {vocab_size}), got {token} at position {position} of row {row}: "
                    "check that tokenizer and model belong together"
                )


def _row_of_list(row: int, prompt: Any) -> list[int]:
    """Read one prompt as ints."""
    if getattr(prompt, "ndim", 0) == 0 and isinstance(to_scalar(prompt), int):  # an array of one id is a prompt
        raise TypeError(
            "prompts must be a list of lists of token ids, got a list of ids: wrap a single prompt as [prompt]"
        )
    ids = to_list(prompt)
    if ids is None:
        raise TypeError(f"a prompt must be a list of token ids, got {type(prompt).__name__} for row {row}")
    try:
        if any(isinstance(token, bool) for token in ids):
            raise TypeError
        return [operator.index(to_scalar(token)) for token in ids]
    except TypeError:
        raise TypeError(f"token ids must be ints, got {ids!r} for row {row}") from None


def _rows_of_tensor(inputs: Tensor, mask: Any) -> list[list[int]]:
    if inputs.dim() != 2 or inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise ValueError(
            f"a tensor of prompts must be integers of shape (B, T), got {inputs.dtype} of shape {tuple(inputs.shape)}: "
            "a single prompt is inputs[None]"
        )
    if inputs.is_meta or getattr(mask, "is_meta", False):
        raise ValueError(
            "prompts and their attention_mask must hold values, and a tensor on the device meta holds none: make it on "
            "another device"
        )
    if mask is None:
        return [list(row) for row in inputs.tolist()]
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"attention_mask must hold 1 for tokens and 0 for padding, got {type(mask).__name__} without numbers: pass "
            "the tokenizer's"
        ) from None
    if mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask must have the prompts' shape, got {tuple(mask.shape)} for {tuple(inputs.shape)}"
        )
    rows = enumerate(zip(inputs.tolist(), mask.tolist(), strict=True))
    return [_without_padding(row, ids, seen) for row, (ids, seen) in rows]


def _without_padding(row: int, ids: list[int], mask: Sequence[Any]) -> list[int]:
    """Select the ids of one row where its mask is 1."""
    odd = next((value for value in mask if value not in (0, 1)), None)
    if odd is not None:
        raise ValueError(f"attention_mask must hold 0 and 1 only, got {odd} in row {row}")
    real = [position for position, value in enumerate(mask) if value]
    if real and real[-1] - real[0] + 1 != len(real):
        raise ValueError(
            f"attention_mask must be one run of ones per row, but row {row} has a hole: pad on one side only"
        )
    return [ids[position] for position in real]


def read_beside_tokens(name: str, given: Any, attention_mask: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Read inputs with a value per token, such as `token_type_ids`, as one list per prompt, without padding.

    >>> read_beside_tokens("token_type_ids", [[0, 0, 1], [0, 1, 1]], [[0, 1, 1], [1, 1, 1]], [[1, 5], [1, 6, 7]])
    [[0, 1], [0, 1, 1]]
    """
    rows = [to_list(row) or [] for row in to_list(given) or []]
    if attention_mask is not None:
        masks = [to_list(row) or [] for row in to_list(attention_mask) or []]
        if list(map(len, rows)) == list(map(len, masks)):
            rows = [
                [value for value, seen in zip(row, mask, strict=True) if seen]
                for row, mask in zip(rows, masks, strict=True)
            ]
    ints = all(isinstance(to_scalar(value), int) for row in rows for value in row)
    if not ints or list(map(len, rows)) != list(map(len, prompts)):
        raise ValueError(
            f"{name} must hold one int for each token of each prompt, and this has others: pass it as the processor "
            "gave it, with its input_ids and its attention_mask"
        )
    return [[int(value) for value in row] for row in rows]


def lay_out_beside_tokens(model_kwargs: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    """Lay out the forward's arguments that have a value per token, as the mask (B, T) lays out the tokens."""
    laid_out = dict(model_kwargs)
    for name in beside_tokens(model_kwargs):
        values = torch.tensor([value for row in model_kwargs[name] for value in row], dtype=mask.dtype)
        laid_out[name] = torch.zeros_like(mask).masked_scatter(mask.bool(), values.to(mask.device))
    return laid_out


def beside_tokens(model_kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of arguments that hold a value per token."""
    return [name for name, value in model_kwargs.items() if name.endswith("token_type_ids") and value is not None]


def check_named_ids(given: Any, rows: int, vocab_size: int) -> list[list[int]]:
    """Read `logprobs_of`, the ids to score: a list for all rows, or one per row; empty lists if not given.

    >>> check_named_ids([5, 9], 2, 32), check_named_ids([[5], []], 2, 32)
    ([[5, 9], [5, 9]], [[5], []])
    """
    if given is None:
        return [[]] * rows
    listed = to_list(given)
    if listed is None:
        raise TypeError(f"logprobs_of must be a list of token ids, or one such list per row, got {given!r}")
    if not listed:
        raise ValueError("logprobs_of must name at least one token id, got none: leave it out")
    each = [to_list(ids) for ids in listed]
    if all(ids is None for ids in each):
        return [[check_int("logprobs_of", token, least=0, most=vocab_size - 1) for token in listed]] * rows
    odd = next((row for row, ids in enumerate(each) if ids is None), None)
    if odd is not None:
        raise TypeError(
            f"logprobs_of must be a list of token ids, or one such list per row, got {listed[odd]!r} for row {odd}"
        )
    check_count("logprobs_of", len(each), rows)
    return [
        [check_int("logprobs_of", token, least=0, most=vocab_size - 1, where=f" for row {row}") for token in ids or []]
        for row, ids in enumerate(each)
    ]


def check_lengths(prompts: Sequence[Sequence[int]], most: int | None, *, name: str = "max_seq_len") -> None:
    """Refuse a prompt of more than `most` tokens, rather than cut it silently."""
    for row, prompt in enumerate(prompts):
        if most is not None and len(prompt) > most:
            raise ValueError(
                f"a prompt must fit {name} of {most} tokens, but row {row} has {len(prompt)}: shorten or split it"
            )


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Left-pad prompts: ids (B, longest) and mask (B, longest). The padding is the row's own first token, masked.

    Processors see the ids, and a repetition penalty would count a pad token as a token of the text.

    >>> left_padded([[1, 5], [1, 6, 7]])
    (tensor([[1, 1, 5],
            [1, 6, 7]]), tensor([[0, 1, 1],
            [1, 1, 1]]))
    """
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[prompt[0]] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    return ids, mask


def right_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad prompts with 0: ids (B, longest) and mask (B, longest).

    >>> right_padded([[1, 5], [1, 6, 7]])
    (tensor([[1, 5, 0],
            [1, 6, 7]]), tensor([[1, 1, 0],
            [1, 1, 1]]))
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return ids, mask
