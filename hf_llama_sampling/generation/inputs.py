"""Reading prompts: lists, arrays or tensors of token ids become lists of ints, one per row, without padding.

What this module does not do: it sees no text, and never takes a token id for padding.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def read_prompts(inputs: Any, attention_mask: Any, vocab_size: int) -> list[list[int]]:
    """Prompts as lists of ids, without padding.

    Args:
        inputs: lists of token ids, or a tensor (B, T).
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side; goes with a tensor.
        vocab_size: ids must lie below it.

    Raises:
        ValueError: no prompt, an empty one, an id outside the vocabulary, or a bad mask.
        TypeError: text, or something that holds no token ids.

    >>> read_prompts(torch.tensor([[0, 1, 5], [1, 6, 7]]), [[0, 1, 1], [1, 1, 1]], 32)
    [[1, 5], [1, 6, 7]]
    """
    if inputs is None:
        raise ValueError(
            "generate needs prompts: lists of token ids, or a tensor of shape (B, T) with its attention_mask"
        )
    if isinstance(inputs, str) or (isinstance(inputs, Sequence) and any(isinstance(row, str) for row in inputs)):
        raise TypeError("prompts must be token ids, got text: encode it with the tokenizer first")
    if isinstance(inputs, Tensor):
        prompts = _rows_of_tensor(inputs, attention_mask)
    elif isinstance(inputs, Sequence):
        if attention_mask is not None:
            raise ValueError(
                "attention_mask goes with a tensor; prompts given as lists carry their own lengths: drop it"
            )
        prompts = [_row_of_list(row, prompt) for row, prompt in enumerate(inputs)]
    else:
        raise TypeError(
            f"prompts must be lists of token ids or a tensor of shape (B, T), got {type(inputs).__name__}: "
            "pass tokenizer(...)['input_ids'] and its attention_mask"
        )
    _check_prompts(prompts, vocab_size)
    return prompts


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
    """One prompt as ints."""
    if isinstance(prompt, int):
        raise TypeError(
            "prompts must be a list of lists of token ids, got a list of ids: wrap a single prompt as [prompt]"
        )
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence):
        raise TypeError(f"a prompt must be a list of token ids, got {type(prompt).__name__} for row {row}")
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise TypeError(f"token ids must be ints, got {prompt!r} for row {row}") from None


def _rows_of_tensor(inputs: Tensor, mask: Any) -> list[list[int]]:
    if inputs.dim() != 2 or inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise ValueError(
            f"a tensor of prompts must be integers of shape (B, T), got {inputs.dtype} of shape {tuple(inputs.shape)}: "
            "a single prompt is inputs[None]"
        )
    if mask is None:
        return [list(row) for row in inputs.tolist()]
    mask = torch.as_tensor(mask)
    if mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask must have the prompts' shape, got {tuple(mask.shape)} for {tuple(inputs.shape)}"
        )
    prompts = []
    for row, (ids, seen) in enumerate(zip(inputs.tolist(), mask.tolist(), strict=True)):
        odd = next((value for value in seen if value not in (0, 1)), None)
        if odd is not None:
            raise ValueError(f"attention_mask must hold 0 and 1 only, got {odd} in row {row}")
        real = [position for position, value in enumerate(seen) if value]
        if real and real[-1] - real[0] + 1 != len(real):
            raise ValueError(
                f"attention_mask must be one run of ones per row, but row {row} has a hole: pad on one side only"
            )
        prompts.append([ids[position] for position in real])
    return prompts


def check_lengths(prompts: Sequence[Sequence[int]], most: int | None, *, name: str = "max_seq_len") -> None:
    """Refuse a prompt of more than `most` tokens: no prompt is cut silently."""
    for row, prompt in enumerate(prompts):
        if most is not None and len(prompt) > most:
            raise ValueError(
                f"a prompt must fit {name} of {most} tokens, but row {row} has {len(prompt)}: shorten or split it"
            )


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, longest) and their mask (B, longest). Each row is filled with its own first token, which is masked.

    Processors see the ids: a pad token would count as a token of the text for a repetition penalty.

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
    """Ids (B, longest) and their mask (B, longest), with 0 after each row.

    >>> right_padded([[1, 5], [1, 6, 7]])
    (tensor([[1, 5, 0],
            [1, 6, 7]]), tensor([[1, 1, 0],
            [1, 1, 1]]))
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    return ids, mask
