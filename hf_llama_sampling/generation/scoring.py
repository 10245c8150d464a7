"""Raw log-probabilities of given tokens, in memory bounded by a byte budget.

A chunk of columns is forwarded, its logits are reduced to the few numbers asked for, and the cache is handed on to the
next chunk and, at the end, to whoever continues the text. No (B, T, V) tensor is built. Logprobs are of the float32
logits, without temperature or nucleus (facebookresearch/llama, ``llama/generation.py``). What this module does not do:
it samples nothing and trims nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import nonfinite
from .inputs import right_padded
from .model_info import device_of, vocab_size_of
from .options import CACHING, Call
from .plan import Plan

TopLogprobs = list[tuple[int, float]]
"""The best ids of one position with their raw logprobs, best first."""

# For the float32 logits of one chunk and what is made from them. Each chunk reads all weights once more, so a small
# budget costs time: with 135M weights, 8 rows and 255 columns, 16 MiB takes 1.8 times as long as 128 MiB.
CHUNK_BYTES = 128 << 20
_PIECES = 16  # pieces of a budget in which logits are reduced: small enough for a cache, and for what is made of them


class TokenScores(NamedTuple):
    """Logprobs of given tokens, and of the k most probable ones at the same places."""

    logprobs: Tensor  # (B, T)
    top_ids: Tensor  # (B, T, k)
    top_logprobs: Tensor  # (B, T, k)


def score(logits: Tensor, targets: Tensor, top: int) -> TokenScores:
    """The targets' logprobs and the `top` best ones. logits: (B, T, V), targets: (B, T)."""
    logits = logits.float()
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)  # (B, T, 1)
    chosen = (logits.gather(-1, targets[..., None]) - norm).squeeze(-1)
    best, ids = logits.topk(top, dim=-1) if top else (logits[..., :0], targets[..., None][..., :0])
    return TokenScores(chosen, ids, best - norm)


def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
    """One after the other along T."""
    return TokenScores(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def score_in_pieces(logits: Tensor, targets: Tensor, top: int, chunk_bytes: int) -> tuple[TokenScores, Tensor]:
    """`score`, and the logits' sums (B, T) float32, with a part of the budget for what is made on the way."""
    batch, width, vocab_size = logits.shape
    rows = max(1, chunk_bytes // (4 * _PIECES * vocab_size))
    pieces = list(zip(torch.split(logits.flatten(0, 1), rows), torch.split(targets.flatten(), rows), strict=True))
    scores = concatenate([score(some[None], wanted[None], top) for some, wanted in pieces])
    sums = torch.cat([some.sum(-1, dtype=torch.float32) for some, _ in pieces])
    return TokenScores(*(column.view(batch, width, *column.shape[2:]) for column in scores)), sums.view(batch, width)


@dataclass
class RowScores:
    """Scores beside one row's tokens."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


class PromptScores(NamedTuple):
    """The scores of a batch's prompts, in one of two forms; both are None where none were asked for."""

    columns: TokenScores | None = None  # of columns 1 to start - 1, as the plan lays them out
    rows: list[RowScores] | None = None  # of each whole prompt


def row_scores(scores: TokenScores, row: int, span: slice) -> RowScores:
    """One row's scores as lists. Nothing stands before the first token: 0.0, and no best tokens."""
    found = unshifted_row_scores(scores, row, span)
    found.logprobs[0], found.top_logprobs[0] = 0.0, []
    return found


def unshifted_row_scores(scores: TokenScores, row: int, span: slice) -> RowScores:
    """One row's scores as lists, the first one's included."""
    ids, best = scores.top_ids[row, span].tolist(), scores.top_logprobs[row, span].tolist()
    tops = [list(zip(i, b, strict=True)) for i, b in zip(ids, best, strict=True)]
    return RowScores(scores.logprobs[row, span].tolist(), tops)


def unscored(rows: int, columns: int, top: int, device: torch.device) -> TokenScores:
    """Columns without scores: logprob 0.0."""
    best = torch.zeros(rows, columns, top, device=device)
    return TokenScores(torch.zeros(rows, columns, device=device), best.long(), best)


def columns_per_chunk(batch: int, vocab_size: int, chunk_bytes: int) -> int:
    """How many columns fit the budget, one at least."""
    return max(1, 3 * chunk_bytes // (16 * batch * vocab_size))


def bytes_for(batch: int, vocab_size: int, columns: int) -> int:
    """The budget that so many columns need: 4 bytes a logit, and a third as much for what is made of them."""
    return math.ceil(16 * batch * vocab_size * columns / 3)


@torch.no_grad()
def score_columns(
    model: Any,
    input_ids: Tensor,
    targets: Tensor,
    *,
    attention_mask: Tensor | None = None,
    real: Tensor | None = None,
    top: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    model_kwargs: dict[str, Any] | None = None,
) -> tuple[TokenScores, Any]:
    """Forward `input_ids` (B, T) in chunks; the scores of `targets` (B, T), each under the logits of its column.

    Args:
        attention_mask: (B, T), for left-padded rows; positions then count from each row's first real token.
        real: (B, T), where the scores mean something; the mask if there is one, else everywhere.
        top: best tokens to report at each place.
        chunk_bytes: the memory budget of a chunk.
        model_kwargs: further arguments of the model's `forward`.

    Returns:
        The scores, and the model's cache of all T columns (None if it has no such cache). Under padding the scores mean
        nothing.

    Raises:
        ValueError: the text does not fit one chunk and the model's cache holds more than keys and values, or a logit is
            nan or inf in a column that means something; row and position are named.
    """
    batch, width = input_ids.shape
    step = columns_per_chunk(batch, vocab_size_of(model), chunk_bytes)
    positions = None if attention_mask is None else (attention_mask.cumsum(-1) - 1).clamp(min=0)
    parts, sums, cache = [], [], None
    for start in range(0, width, step):
        end = min(start + step, width)
        inputs: dict[str, Any] = dict(model_kwargs or {})
        if attention_mask is not None and positions is not None:
            inputs |= {"attention_mask": attention_mask[:, :end], "position_ids": positions[:, start:end]}
        output = model(input_ids[:, start:end], past_key_values=cache, use_cache=True, return_dict=True, **inputs)
        cache = getattr(output, "past_key_values", None)
        if end < width and not _holds_only_keys_and_values(cache):
            raise ValueError(_needs_one_chunk(model, batch, width))
        logits = output.logits  # on the last device of a model that is spread over several
        scores, of_all = score_in_pieces(logits, targets[:, start:end].to(logits.device), top, chunk_bytes)
        parts.append(TokenScores(*(column.to(input_ids.device) for column in scores)))
        sums.append(of_all.to(input_ids.device))
        del output, logits
    _refuse_nonfinite(torch.cat(sums, dim=1), attention_mask if real is None else real, positions)
    return concatenate(parts), cache


def _refuse_nonfinite(sums: Tensor, real: Tensor | None, positions: Tensor | None) -> None:
    """Name the first row and position whose logits hold nan or inf. sums: (B, T), finite only if every logit is."""
    bad = ~torch.isfinite(sums) & (True if real is None else real != 0)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise nonfinite(row, 1 + (column if positions is None else int(positions[row, column])))


def _needs_one_chunk(model: Any, batch: int, width: int) -> str:
    """The refusal of several chunks, with the budget that one needs."""
    enough = bytes_for(batch, vocab_size_of(model), width)
    return (
        f"scoring a text chunk by chunk needs a cache of keys and values alone, and {type(model).__name__} has none: "
        f"raise chunk_bytes, here to {enough}, so that one chunk holds it all"
    )


def _holds_only_keys_and_values(cache: Any) -> bool:
    """Recurrent states, of hybrid models too, go on by one token, not by a chunk (transformers 5.23)."""
    layers = getattr(cache, "layers", None)
    return layers is not None and len(layers) > 0 and not any(hasattr(layer, "recurrent_states") for layer in layers)


def score_prompts(
    model: Any, prompts: list[list[int]], *, top: int, chunk_bytes: int, model_kwargs: dict[str, Any] | None = None
) -> list[RowScores]:
    """Scores of whole prompts, right-padded: padding after a token cannot change its score, so no mask is needed."""
    ids, mask = (tensor.to(device_of(model)) for tensor in right_padded(prompts))
    parts = [unscored(len(prompts), 1, top, ids.device)]
    if ids.shape[1] > 1:
        scores, _ = score_columns(
            model,
            ids[:, :-1],
            ids[:, 1:],
            real=mask[:, 1:],
            top=top,
            chunk_bytes=chunk_bytes,
            model_kwargs=model_kwargs,
        )
        parts.append(scores)
    columns = concatenate(parts)
    return [row_scores(columns, row, slice(0, len(prompt))) for row, prompt in enumerate(prompts)]


def prefill_scores(
    model: Any, plan: Plan, call: Call, ids: Tensor, mask: Tensor
) -> tuple[PromptScores, dict[str, Any]]:
    """The scores of the prompts where the answer echoes them, and the arguments that hand the cache to the loop.

    Args:
        ids: (B, start), the prompts as the plan lays them out.
        mask: (B, start).
    """
    own_cache = call.to_model.get("past_key_values")
    cache = {} if own_cache is None else {"past_key_values": own_cache}
    others = {name: value for name, value in call.to_model.items() if name != "past_key_values"}
    if not (plan.echo and plan.wants_scores):
        return PromptScores(), cache
    asked: dict[str, Any] = {"top": plan.top_logprobs, "chunk_bytes": plan.chunk_bytes, "model_kwargs": others}
    # The loop goes on from our cache unless the call says which cache to use.
    other_cache = any(call.options.get(name) for name in CACHING) or call.options.get("use_cache") is False
    forced_show_edited_logits = plan.edited and plan.start < plan.longest
    if own_cache is not None or other_cache or forced_show_edited_logits:
        return PromptScores(rows=score_prompts(model, plan.prompts, **asked)), cache
    if plan.start == 1:
        return PromptScores(), cache
    columns, prefilled = score_columns(
        model, ids[:, :-1], ids[:, 1:], attention_mask=mask[:, :-1] if plan.padded else None, **asked
    )
    return PromptScores(columns=columns), {} if prefilled is None else {"past_key_values": prefilled}
