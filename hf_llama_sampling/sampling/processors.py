"""The rule as transformers' `LogitsProcessor`s: two stateless warpers and a sampler that draws by itself.

All derive from `LogitsProcessor`, not from transformers' own warpers, which `generate_batch` replaces by its own. What
this module does not do: it holds no rule (see `nucleus`), and it does not know where a text ends.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import (
    PerRow,
    both_streams,
    check_count,
    check_seeds,
    check_temperature,
    check_top_p,
    nonfinite,
    per_row,
    seeds_as_given,
)
from ..defaults import TEMPERATURE, TOP_P
from . import fast_path as nucleus
from . import streams
from .fast_path import Draw, nucleus_mask, sample_by_rank, sample_by_token, softmax_with_temperature

Stream = streams.MetaStream | streams.LookAhead | streams.PromptStreams


class LlamaTemperatureLogitsWarper(LogitsProcessor):
    r"""Divide the scores by the temperature in float32, as LLAMA2 does; temperature 0 leaves the best token alone.

    Stateless. Pass it together with `LlamaTopPLogitsWarper` to any `generate(do_sample=True)`, and switch
    transformers' own warpers off (`temperature=1.0, top_p=1.0, top_k=0`): they are added after yours.

    Args:
        temperature (`float`): 0 or above.

    Raises:
        ValueError: the temperature is negative, infinite or nan.

    >>> warpers = [LlamaTemperatureLogitsWarper(0.6), LlamaTopPLogitsWarper(0.9)]
    >>> model.generate(**inputs, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, logits_processor=warpers)
    """

    supports_continuous_batching = True

    def __init__(self, temperature: float) -> None:
        self.temperature = check_temperature(temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T), unused; scores: (B, V). Returns new float32 scores (B, V)."""
        scores = scores.float()
        if self.temperature == 0:
            return one_hot(scores.argmax(-1), scores)
        # Adding a constant to a row changes no probability; too cold a division would overflow without it.
        probs_are_safe = self.temperature >= 1e-30
        return scores / self.temperature if probs_are_safe else (scores - scores.amax(-1, keepdim=True)) / 1e-30


class LlamaTopPLogitsWarper(LogitsProcessor):
    r"""Keep LLAMA2's nucleus and set all other scores to -inf.

    In descending order a token is dropped when the float32 mass before it, ``cumsum - p_i``, exceeds `top_p`
    (facebookresearch/llama, ``sample_top_p``). Stateless; the temperature comes before it.

    Args:
        top_p (`float`): from 0 (the best token alone) to 1.

    Raises:
        ValueError: `top_p` is outside [0, 1].

    >>> warper = LlamaTopPLogitsWarper(0.5)
    >>> warper(None, torch.tensor([[0.5, 0.25, 0.25]]).log()).exp()  # transformers' own would keep one
    tensor([[0.5000, 0.2500, 0.0000]])
    """

    supports_continuous_batching = True

    def __init__(self, top_p: float) -> None:
        self.top_p = check_top_p(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T), unused; scores: (B, V). Returns new scores (B, V)."""
        kept = nucleus_mask(torch.softmax(scores.float(), dim=-1), self.top_p)
        return scores.masked_fill(~kept, -math.inf)


class LlamaSampler(LogitsProcessor):
    r"""Draw LLAMA2's token and answer with a one-hot row: 0 at the token, -inf elsewhere.

    For `generate(do_sample=False, logits_processor=[sampler])` on any model, after processors that edit logits.

    Args:
        temperature (`float` or one per row): 0 means the best token, and `top_p` then plays no part.
        top_p (`float` or one per row): from 0 to 1.
        generator (`torch.Generator`, *optional*): of the logits' device; torch's global one if not given. Draws are the
            reference's, (B, V) values a step.
        seeds (`int` or one per row, *optional*): one stream per row instead; an int means `seed, seed + 1, ...`. A
            token's noise depends on its row's seed, its position in the row and its id.
        attention_mask (`torch.Tensor` of shape (B, T), *optional*): with `seeds` and a left-padded batch, the prompts'
            mask, so that positions count from each row's first real token.

    Raises:
        ValueError: a value out of range, `seeds` together with `generator`, or (at the call) a wrong number of rows.

    >>> sampler = LlamaSampler(0.6, 0.9, seeds=7)
    >>> model.generate(**inputs, do_sample=False, logits_processor=[sampler])
    """

    def __init__(
        self,
        temperature: PerRow = TEMPERATURE,
        top_p: PerRow = TOP_P,
        *,
        generator: torch.Generator | None = None,
        seeds: int | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
    ) -> None:
        if seeds is not None and generator is not None:
            raise ValueError(both_streams())
        if attention_mask is not None and seeds is None:
            raise ValueError(
                "attention_mask sets the positions of per-prompt streams, so it needs seeds: give seeds, or drop it"
            )
        self.temperature = per_row("temperature", temperature, check_temperature)
        self.top_p = per_row("top_p", top_p, check_top_p)
        self.generator = generator
        self.seeds = None if seeds is None else seeds_as_given(seeds)
        self.pads = None if attention_mask is None else left_pads(attention_mask)
        self.stream: Stream = streams.MetaStream(generator)
        self.made_for: tuple[Any, ...] = ()
        self.on_device: tuple[float | Tensor, float | Tensor] = (0.0, 0.0)  # temperature and top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns new float32 scores (B, V), one-hot."""
        if input_ids.dim() != 2:
            raise ValueError(
                f"LlamaSampler needs input_ids of shape (B, T), got {tuple(input_ids.shape)}: under continuous "
                "batching use LlamaTemperatureLogitsWarper and LlamaTopPLogitsWarper"
            )
        self._set_up(len(scores), scores.device)
        if nucleus.on_cpu(scores):
            bad = ~torch.isfinite(scores.amax(-1))
            if bad.any():
                row = int(bad.nonzero()[0])
                raise nonfinite(row, input_ids.shape[1] - (self.pads[row] if self.pads else 0))
        draw = sample(scores.float(), *self.on_device, self.stream, input_ids.shape[1])
        return one_hot(draw.tokens, scores)

    def _set_up(self, rows: int, device: torch.device) -> None:
        """What a batch needs beside its logits, once: a copy from the host in every step would wait for the device."""
        asked = (rows, device, *map(_frozen, (self.temperature, self.top_p, self.seeds)), self.generator)
        if self.made_for == asked:
            return
        temperature = per_row("temperature", self.temperature, check_temperature)
        top_p = per_row("top_p", self.top_p, check_top_p)
        self.on_device = (
            for_rows("temperature", temperature, rows, device),
            for_rows("top_p", top_p, rows, device),
        )
        if self.seeds is None:
            self.stream = streams.MetaStream(self.generator)
        else:
            pads = self.pads or [0] * rows
            check_count("attention_mask", len(pads), rows)
            self.stream = streams.PromptStreams(check_seeds(self.seeds, rows), [0] * rows, [-pad for pad in pads])
        self.made_for = asked


def _frozen(values: Any) -> Any:
    """A setting as it is now, whatever is done to its list later."""
    values = values.tolist() if hasattr(values, "tolist") else values
    return tuple(values) if isinstance(values, (list, tuple)) else values


def sample(logits: Tensor, temperature: float | Tensor, top_p: float | Tensor, stream: Stream, column: int) -> Draw:
    """The ladder of one step: scale, keep the nucleus, draw. logits: (B, V) float32; per-row settings: (B, 1)."""
    if not isinstance(temperature, Tensor) and temperature == 0:
        tokens = logits.argmax(-1)
        return Draw(tokens, torch.ones_like(tokens, dtype=torch.float32))
    noise = stream.step(logits.shape, logits.device, column)
    by = sample_by_rank if stream.by_rank else sample_by_token
    draw = by(softmax_with_temperature(logits, temperature), top_p, noise)
    if not isinstance(temperature, Tensor):
        return draw
    greedy = (temperature == 0).squeeze(1)
    return Draw(torch.where(greedy, logits.argmax(-1), draw.tokens), torch.where(greedy, 1.0, draw.probs))


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw from the nucleus of each row: equal to the reference's ``sample_top_p`` bit for bit, ties included.

    Args:
        probs: (B, V) float32, each row summing to 1.
        p: from 0 to 1.
        generator: of the same device; torch's global one if not given. It is left as the reference leaves it.

    Returns:
        ids, LongTensor (B, 1).

    Raises:
        ValueError: `p` is outside [0, 1], `probs` is not of two dimensions, or (seen on CPU alone) holds nan or inf.
    """
    if probs.dim() != 2:
        raise ValueError(
            f"probs must be of shape (B, V), got {tuple(probs.shape)}: add a batch dimension with probs[None]"
        )
    p, probs = check_top_p(p), probs.float()
    if nucleus.on_cpu(probs) and not torch.isfinite(probs.sum(-1)).all():
        raise ValueError("probs must be finite, but hold nan or inf: check the logits that they were made of")
    if probs.is_contiguous():
        noise = streams.MetaStream(generator).step(probs.shape, probs.device, 0)
        return sample_by_rank(probs, p, noise).tokens[:, None]
    # torch sorts ties, sums, and fills with random numbers in memory's order: in another layout keep to its own steps.
    ordered, tokens = torch.sort(probs, dim=-1, descending=True)
    ordered.masked_fill_(ordered.cumsum(-1) - ordered > p, 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    return tokens.gather(1, torch.multinomial(ordered, num_samples=1, generator=generator))


def one_hot(tokens: Tensor, scores: Tensor) -> Tensor:
    """(B, V) float32: 0 at `tokens` (B,), -inf elsewhere, so that argmax and softmax both give the token."""
    row = torch.full(scores.shape, -math.inf, dtype=torch.float32, device=scores.device)
    return row.scatter_(1, tokens[:, None], 0.0)


def for_rows(name: str, value: float | list[float], rows: int, device: torch.device) -> float | Tensor:
    """Per-row settings as a tensor (B, 1); a shared one stays a Python number.

    The difference matters: on CUDA a division by a number and one by a tensor round differently, and the reference
    divides by a number.
    """
    if not isinstance(value, list):
        return value
    check_count(name, len(value), rows)
    if len(set(value)) == 1:
        return value[0]
    return torch.tensor(value, dtype=torch.float32, device=device)[:, None]


def left_pads(attention_mask: Tensor) -> list[int]:
    """How many pads stand before each row of a left-padded batch. attention_mask: (B, T)."""
    mask = attention_mask != 0
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be of shape (B, T), got {tuple(mask.shape)}: add a batch dimension")
    for row, seen in enumerate(mask.tolist()):
        if seen != sorted(seen):
            raise ValueError(
                f"attention_mask must be left-padded, but row {row} has a 0 after a 1: pad with padding_side='left'"
            )
    return [int(pads) for pads in (~mask).sum(-1).tolist()]
