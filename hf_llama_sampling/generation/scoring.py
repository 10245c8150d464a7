"""Raw log-probabilities of given tokens, in memory bounded by a byte budget.

transformers' loop prefills the prompts, in chunks if they do not fit the budget; each chunk's logits are reduced to the
few numbers asked for, and the loop continues from its own cache. No (B, T, V) tensor is built. Logprobs are of the
float32 logits, without temperature or nucleus (facebookresearch/llama, ``llama/generation.py``). What this module does
not do: it samples nothing and trims nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..checks import nonfinite
from .adapters import soft_prompts_of
from .inputs import beside_tokens, lay_out_beside_tokens, right_padded
from .model_info import device_of, vocab_size_of
from .probe import Probe

TopLogprobs = list[tuple[int, float]]
"""The best ids of one position with their raw logprobs, best first."""
NamedLogprobs = list[tuple[int, float, int]]
"""The ids that were asked for at one position, in that order, with their raw logprobs and ranks, from 1."""

# For one chunk's float32 logits and the tensors computed from them. Each chunk reads all weights again, so a small
# budget costs time: with 135M weights, 8 rows and 255 columns, 16 MiB takes 1.8 times as long as 128 MiB.
CHUNK_BYTES = 128 << 20
_PIECES = 16  # reduce logits in pieces of 1/16 of the budget: they fit a processor's cache, and leave memory over


@dataclass(frozen=True, eq=False)
class Asked:
    """Scores to return at each position, beside the logprob of its token."""

    top: int  # number of best tokens
    named: list[list[int]]  # for each row the ids whose logprobs and ranks to return
    device: torch.device

    @cached_property
    def ids(self) -> Tensor:
        """(B, n): `named`, with 0 after the shorter lists."""
        count = max(map(len, self.named))
        rows = [[*ids, *[0] * (count - len(ids))] for ids in self.named]
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(rows), count)

    @property
    def same_for_all(self) -> bool:
        """Whether all rows ask for the same ids."""
        return all(ids == self.named[0] for ids in self.named)

    def of_rows(self, rows: Sequence[int]) -> "Asked":
        """Select some rows."""
        return Asked(self.top, [self.named[row] for row in rows], self.device)


class TokenScores(NamedTuple):
    """At each place: the logprobs of its token, of the k best tokens, and of n named ids with their ranks."""

    logprobs: Tensor  # (B, T)
    top_ids: Tensor  # (B, T, k)
    top_logprobs: Tensor  # (B, T, k)
    named_logprobs: Tensor  # (B, T, n)
    named_ranks: Tensor  # (B, T, n)


def score(logits: Tensor, targets: Tensor, ids: Tensor, top: int) -> TokenScores:
    """Score targets, named ids and the `top` best tokens. logits: (B, T, V), targets: (B, T), ids: (B, T, n)."""
    logits = logits.float()
    norm = torch.logsumexp(logits, dim=-1, keepdim=True)  # (B, T, 1)
    chosen = (logits.gather(-1, targets[..., None]) - norm).squeeze(-1)
    best, best_ids = logits.topk(top, dim=-1) if top else (logits[..., :0], targets[..., None][..., :0])
    return TokenScores(chosen, best_ids, best - norm, logits.gather(-1, ids) - norm, ranks(logits, ids))


def ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """Rank ids: 1 for the most probable one; among equal logits the lower id comes first.

    Args:
        logits: (..., V).
        ids: (..., n).

    >>> ranks(torch.tensor([1.0, 3.0, 1.0, 2.0]), torch.tensor([1, 0, 2]))
    tensor([1, 3, 4])
    """
    found = torch.empty_like(ids)
    places = torch.arange(logits.shape[-1], device=logits.device)
    for column in range(ids.shape[-1]):
        own = ids[..., column : column + 1]
        value = logits.gather(-1, own)
        before = (logits > value) | ((logits == value) & (places < own))
        found[..., column] = before.sum(-1) + 1
    return found


def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
    """Concatenate along T."""
    return TokenScores(*(torch.cat(column, dim=1) for column in zip(*parts, strict=True)))


def score_in_pieces(
    logits: Tensor, targets: Tensor, ids: Tensor, top: int, chunk_bytes: int
) -> tuple[TokenScores, Tensor]:
    """`score` piece by piece, to bound memory; also return (B, T) whether logits hold nan or inf."""
    batch, width, vocab_size = logits.shape
    rows = rows_per_piece(vocab_size, chunk_bytes)
    flat = (logits.flatten(0, 1), targets.flatten(), ids.flatten(0, 1))
    pieces = list(zip(*(torch.split(values, rows) for values in flat), strict=True))
    scores = concatenate([score(some[None], wanted[None], named[None], top) for some, wanted, named in pieces])
    bad = torch.cat([nonfinite_rows(some) for some, _, _ in pieces])
    return TokenScores(*(column.view(batch, width, *column.shape[2:]) for column in scores)), bad.view(batch, width)


def nonfinite_rows(logits: Tensor) -> Tensor:
    """(...,) whether logits (..., V) hold nan or inf. A sum cannot tell: finite logits may add up to infinity."""
    least, most = torch.aminmax(logits, dim=-1)
    return least * 0 != most * 0  # 0 times nan or inf is nan, which equals nothing


@dataclass
class RowScores:
    """Scores of one row, one entry per token."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    named: list[NamedLogprobs] = field(default_factory=list)

    def after(self, prompt: "RowScores") -> "RowScores":
        """Replace the scores of the row's first tokens by those of its prompt."""
        given = len(prompt.logprobs)
        return RowScores(
            prompt.logprobs + self.logprobs[given:],
            prompt.top_logprobs + self.top_logprobs[given:],
            prompt.named + self.named[given:],
        )


def row_scores(scores: TokenScores, row: int, span: slice, asked: Asked) -> RowScores:
    """Return one row's scores as lists; 0.0, and no best or named tokens, for the first token, which has no context."""
    found = unshifted_row_scores(scores, row, span, asked)
    found.logprobs[0], found.top_logprobs[0], found.named[0] = 0.0, [], []
    return found


def unshifted_row_scores(scores: TokenScores, row: int, span: slice, asked: Asked) -> RowScores:
    """Return one row's scores as lists, the first token's included."""
    ids, best = scores.top_ids[row, span].tolist(), scores.top_logprobs[row, span].tolist()
    tops = [list(zip(i, b, strict=True)) for i, b in zip(ids, best, strict=True)]
    logprobs, places = scores.named_logprobs[row, span].tolist(), scores.named_ranks[row, span].tolist()
    # `strict=False` drops the padding of shorter lists.
    named = [list(zip(asked.named[row], *both, strict=False)) for both in zip(logprobs, places, strict=True)]
    return RowScores(scores.logprobs[row, span].tolist(), tops, named)


def unscored(columns: int, asked: Asked) -> TokenScores:
    """Make columns without scores: logprob 0.0."""
    rows, device = len(asked.named), asked.device
    best, named = (torch.zeros(rows, columns, count, device=device) for count in (asked.top, asked.ids.shape[1]))
    return TokenScores(torch.zeros(rows, columns, device=device), best.long(), best, named, named.long())


def columns_per_chunk(batch: int, vocab_size: int, chunk_bytes: int) -> int:
    """Compute how many columns fit the budget, at least one; see `bytes_for`."""
    return max(1, 3 * chunk_bytes // (16 * batch * vocab_size))


def rows_per_piece(vocab_size: int, chunk_bytes: int) -> int:
    """Compute how many rows of logits to reduce in one piece."""
    return max(1, chunk_bytes // (4 * _PIECES * vocab_size))


def bytes_for(batch: int, vocab_size: int, columns: int) -> int:
    """Compute the budget for so many columns: 4 bytes a logit, and a third as much for the tensors computed from it."""
    return math.ceil(16 * batch * vocab_size * columns / 3)


class PromptScorer:
    """Scores the columns of prompts as transformers' loop prefills them.

    An observer between the loop and the model's forward: it asks for the logits of all columns, reduces them, and
    returns the last column's to the loop. So the model's inputs are the loop's own, whatever wraps the model.

    Args:
        name: the model's, for errors.
        targets: (B, T), for each column the token to score under its logits; the last column may have none.
        columns: number of the prompts' columns.
        chunk: most columns in one forward; None for all.
        asked: scores to compute at each place, beside the targets'.
        chunk_bytes: the memory budget of a chunk.
    """

    def __init__(
        self, name: str, targets: Tensor, *, columns: int, chunk: int | None, asked: Asked, chunk_bytes: int
    ) -> None:
        self.name, self.targets, self.columns, self.chunk = name, targets, columns, chunk or columns
        self.asked, self.chunk_bytes = asked, chunk_bytes
        self.seen = 0  # columns prefilled so far
        self.parts: list[TokenScores] = []
        self.bad: list[Tensor] = []  # (B, n) each: whether a column's logits hold nan or inf

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Forward, and score this forward's columns if they belong to the prompts."""
        width = min(self.chunk, self.columns - self.seen)
        if width <= 0:
            return forward(*args, **kwargs)
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = width
        output = forward(*args, **kwargs)
        logits = output.logits  # (B, width or more, V), on the last device of a model that is spread over several
        if logits.shape[1] < width:
            raise ValueError(too_few_logits(self.name, logits.shape[1], width))
        # Count from the end, since soft prompts precede a text's own columns.
        self._score(logits[:, -width:], self.targets[:, self.seen : self.seen + width])
        self.seen += width
        output.logits = logits[:, -1:].clone()
        return output

    def _score(self, logits: Tensor, targets: Tensor) -> None:
        """Score the targets (B, n) under the first n columns of the logits, and store the scores."""
        if not targets.shape[1]:
            return
        logits = logits[:, : targets.shape[1]]
        ids = self.asked.ids[:, None].expand(-1, targets.shape[1], -1)  # (B, n columns, named ids)
        there = logits.device
        scores, bad = score_in_pieces(logits, targets.to(there), ids.to(there), self.asked.top, self.chunk_bytes)
        self.parts.append(TokenScores(*(column.to(targets.device) for column in scores)))
        self.bad.append(bad.to(targets.device))

    def take(self, scores: TokenScores | None, bad: Tensor | None) -> None:
        """Take over the scores of the first columns, which a shared prefill has computed."""
        if scores is not None and bad is not None:
            self.parts.append(scores)
            self.bad.append(bad)
            self.seen = bad.shape[1]

    def found(self) -> tuple[TokenScores, Tensor]:
        """Return the scores of all targets, and (B, T) whether a column's logits hold nan or inf."""
        return concatenate(self.parts), torch.cat(self.bad, dim=1)

    def scores(self, offsets: Sequence[int], real: Tensor | None = None) -> TokenScores:
        """Return the scores of all targets.

        Args:
            offsets: the column in which each row starts.
            real: (B, T), 0 for columns of padding; by default, the columns before each row's first.

        Raises:
            ValueError: a logit is nan or inf outside padding; row and position are named.
        """
        scores, bad = self.found()
        first = torch.tensor(offsets, device=bad.device)[:, None]
        columns = torch.arange(bad.shape[1], device=bad.device)
        bad = bad & ((columns >= first) if real is None else real != 0)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            raise nonfinite(row, 1 + column - offsets[row])
        return scores


def score_prompts(
    model: Any,
    generate: Callable[..., Any],
    prompts: list[list[int]],
    *,
    asked: Asked,
    chunk_bytes: int,
    model_kwargs: dict[str, Any] | None = None,
) -> list[RowScores]:
    """Score whole prompts, right-padded: padding after a token cannot change its score, so no mask is needed.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model, which takes an `observer`.
        prompts: lists of ids.
        asked: scores to compute at each position, beside its token's.
        chunk_bytes: memory for the logits of one chunk of columns.
        model_kwargs: further arguments of the model's `forward`.

    Raises:
        ValueError: logits with nan or inf; row and position are named.
    """
    ids, mask = (tensor.to(device_of(model)) for tensor in right_padded(prompts))
    columns = unscored(1, asked)
    if ids.shape[1] > 1:
        given = lay_out_beside_tokens(model_kwargs or {}, mask)
        # Inputs beside the ids, such as images, need all ids. Otherwise leave out the last one, which scores nothing.
        read = ids if given else ids[:, :-1]
        scorer = prefill_only(model, generate, read, ids[:, 1:], asked, chunk_bytes, given)
        columns = concatenate([columns, scorer.scores([0] * len(prompts), mask[:, 1:])])
    return [row_scores(columns, row, slice(0, len(prompt)), asked) for row, prompt in enumerate(prompts)]


def prefill_only(
    model: Any,
    generate: Callable[..., Any],
    input_ids: Tensor,
    targets: Tensor,
    asked: Asked,
    chunk_bytes: int,
    model_kwargs: dict[str, Any],
) -> PromptScorer:
    """Prefill `input_ids` (B, T), score `targets` (B, T), and discard the one token that `generate` must make."""
    chunk = chunk_of(model, generate, input_ids, chunk_bytes, whole=bool(beside_tokens(model_kwargs)))
    scorer = PromptScorer(
        type(model).__name__, targets, columns=input_ids.shape[1], chunk=chunk, asked=asked, chunk_bytes=chunk_bytes
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=1, prefill_chunk_size=chunk)
    mask = torch.ones_like(input_ids)
    generate(input_ids, attention_mask=mask, generation_config=config, observer=scorer, **model_kwargs)
    return scorer


def refuse_other_positions(model: Any, probe: Probe) -> None:
    """Refuse a model that numbers positions otherwise than the loop: it was trained on its own numbers."""
    if not probe.counts_positions():
        raise ValueError(
            f"{type(model).__name__} counts the positions of a text in its own way, and transformers' loop tells it "
            "positions from 0 on, which it was not trained on: take another model, or call transformers' own generate"
        )


def refuse_without_order(model: Any, probe: Probe) -> None:
    """Refuse logprobs of given texts from a model that is not causal: its logits at t do not score token t + 1."""
    if not probe.scores_prompts():
        raise ValueError(
            "logprobs of a given text need a model that reads from left to right and gives the logits of all its "
            f"positions, and {type(model).__name__} does not: leave out echo, or take another model"
        )


def chunk_of(
    model: Any, generate: Callable[..., Any], input_ids: Tensor, chunk_bytes: int, *, whole: bool = False
) -> int | None:
    """Compute the columns of one chunk if prompts (B, T) do not fit the budget as a whole, else None.

    `whole`: whether to forbid chunks, since tokens of an image may see later ones.

    Raises:
        ValueError: the text does not fit, and cannot be forwarded in chunks.
    """
    batch, width = input_ids.shape
    columns = columns_per_chunk(batch, vocab_size_of(model), chunk_bytes)
    if columns >= width:
        return None
    if whole:
        raise ValueError(
            "token types may let tokens of an image see each other, so a text is not read in parts beside them: raise "
            f"chunk_bytes, here to {bytes_for(batch, vocab_size_of(model), width)}"
        )
    if not Probe(model, generate).reads_in_chunks(width):
        raise ValueError(needs_one_chunk(model, batch, width))
    return columns


def too_few_logits(name: str, found: int, width: int) -> str:
    """Word the refusal of a model whose forward returns fewer logits than asked for."""
    return (
        f"logprobs of a prompt need the logits of all its positions, and {name} gives {found} for {width}: leave out "
        "echo and logprobs, or take another model"
    )


def needs_one_chunk(model: Any, batch: int, width: int) -> str:
    """Word the refusal of several chunks, with the budget for one."""
    cache = "keys and values alone" if soft_prompts_of(model) is None else "the text alone, without virtual tokens"
    return (
        f"scoring a text chunk by chunk needs a cache of {cache} that forgets none that is still seen, and "
        f"{type(model).__name__} has none: "
        f"raise chunk_bytes, here to {bytes_for(batch, vocab_size_of(model), width)}, so that one chunk holds it all"
    )
