"""The rule as transformers' `LogitsProcessor`s: two stateless warpers and a sampler that draws by itself.

All derive from `LogitsProcessor`, not from transformers' own warpers, which `generate_batch` replaces by its own. What
this module does not do: it holds no rule (see `rule`), and it does not know where a text ends.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ..checks import PerRow, check_count, check_generator, check_temperature, check_top_p, nonfinite, to_python
from ..defaults import TEMPERATURE, TOP_P
from . import fast_path, rule
from .rule import Draw
from .sampler import TokenSampler, one_hot
from .settings import SamplingSettings
from .streams import MetaStream, PromptStreams, left_pads


class LlamaTemperatureLogitsWarper(LogitsProcessor):
    r"""Divide the scores by the temperature in float32, as LLAMA2 does; temperature 0 leaves the best token alone.

    Stateless: one object serves any batch, device, dtype and thread. Pass it with [`LlamaTopPLogitsWarper`] to any
    `generate(do_sample=True)`, and switch transformers' own warpers off (`temperature=1.0, top_p=1.0, top_k=0`): they
    are added after yours.

    Source: facebookresearch/llama, ``llama/generation.py``, ``Llama.generate``.

    Args:
        temperature (`float`): 0 or above.

    Raises:
        ValueError: the temperature is negative, infinite or nan.
        TypeError: it is no number; bools and strings are none.

    >>> warper = LlamaTemperatureLogitsWarper(0.5)
    >>> warper(None, torch.tensor([[1.0, 2.0, -3.0]]))
    tensor([[ 2.,  4., -6.]])
    >>> LlamaTemperatureLogitsWarper(0)(None, torch.tensor([[1.0, 2.0, -3.0]]))
    tensor([[-inf, 0., -inf]])
    """

    supports_continuous_batching = True

    def __init__(self, temperature: float) -> None:
        self.temperature = check_temperature(temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T), unused; scores: (B, V). Returns new float32 scores (B, V)."""
        _check_scores(scores)
        if self.temperature == 0:
            return one_hot(scores.argmax(-1), scores)
        # A row of a beam search may have no token left; it stays one of -inf, as under transformers' own warper.
        return rule.scale(scores, self.temperature).masked_fill(scores == -math.inf, -math.inf)


class LlamaTopPLogitsWarper(LogitsProcessor):
    r"""Keep LLAMA2's nucleus and set all other scores to -inf.

    In descending order a token is dropped when the float32 mass before it, ``cumsum - p_i``, exceeds `top_p`.
    Stateless: one object serves any batch, device, dtype and thread. The temperature comes before it.

    Source: facebookresearch/llama, ``llama/generation.py``, ``sample_top_p``.

    Args:
        top_p (`float`): from 0 (the best token alone) to 1.

    Raises:
        ValueError: `top_p` is outside [0, 1].
        TypeError: it is no number; bools and strings are none.

    >>> warper = LlamaTopPLogitsWarper(0.5)
    >>> warper(None, torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()).exp()  # transformers' own would keep one token
    tensor([[0.5000, 0.2500, 0.0000, 0.0000]])
    """

    supports_continuous_batching = True

    def __init__(self, top_p: float) -> None:
        self.top_p = check_top_p(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T), unused; scores: (B, V). Returns new scores (B, V)."""
        _check_scores(scores)
        probs = torch.softmax(scores.detach().float(), dim=-1)
        path = fast_path if fast_path.on_cpu(probs) else rule
        return scores.masked_fill(~path.keep_mask(probs, self.top_p), -math.inf)


class LlamaSampler(LogitsProcessor):
    r"""Draw LLAMA2's token and answer with a one-hot row: 0 at the token, -inf elsewhere.

    For `generate(do_sample=False, logits_processor=[sampler])` on any model, after processors that edit logits. One
    object serves calls of any batch size, device and dtype, one after the other or in several threads (a `generator`
    then gives its numbers to whichever thread asks first; streams of `seeds` are each call's own).

    Source of the rule: facebookresearch/llama, ``llama/generation.py``.

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
        ValueError: a value out of range, `seeds` together with `generator`; at the call: a wrong number of rows, a
            generator of another device, or (on CPU) logits with nan or inf, row and position named.
        TypeError: a value that is no number; bools and strings are none.

    >>> sampler = LlamaSampler(0.6, 0.9, seeds=7)
    >>> sampler(torch.tensor([[1, 5]]), torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log())
    tensor([[0., -inf, -inf, -inf]])
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
        if attention_mask is not None and seeds is None:
            raise ValueError(
                "attention_mask sets the positions of per-prompt streams, so it needs seeds: give seeds, or drop it"
            )
        settings = SamplingSettings(temperature, top_p, seeds, generator)
        # Attributes may be set anew, lists changed in place: the next call checks and takes them as they then are.
        self.temperature, self.top_p, self.seeds = map(_as_list, (settings.temperature, settings.top_p, settings.seeds))
        self.generator = generator
        self.pads = None if attention_mask is None else left_pads(_as_mask(attention_mask))
        self._ready = threading.local()  # the last call's settings, and its TokenSampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns new float32 scores (B, V), one-hot."""
        _check_scores(scores)
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be a tensor of shape (B, T), got {type(input_ids).__name__}")
        if input_ids.dim() != 2:
            raise ValueError(
                f"LlamaSampler needs input_ids of shape (B, T), got {tuple(input_ids.shape)}: under continuous "
                "batching use LlamaTemperatureLogitsWarper and LlamaTopPLogitsWarper"
            )
        if len(input_ids) != len(scores):
            raise ValueError(f"scores must have one row per row of input_ids, got {len(scores)} for {len(input_ids)}")
        column = input_ids.shape[1]
        sampler = self._sampler_for(len(scores), scores.device)
        draw = sampler(scores.detach().float(), column, with_mass=False)
        if fast_path.on_cpu(scores):
            for row, prob in enumerate(draw.softmax_probs.tolist()):
                if math.isnan(prob):
                    raise nonfinite(row, column - (self.pads[row] if self.pads else 0))
        return one_hot(draw.tokens, scores)

    def _sampler_for(self, rows: int, device: torch.device) -> TokenSampler:
        """A sampler for such a batch: the last call's, if nothing has changed since."""
        settings = tuple(map(_as_tuple, (self.temperature, self.top_p, self.seeds))), self.generator
        asked = (rows, device, settings)
        if getattr(self._ready, "asked", None) != asked:
            self._ready.sampler = self._make_sampler(rows, device)
            self._ready.asked = asked
        return self._ready.sampler  # type: ignore[no-any-return]

    def _make_sampler(self, rows: int, device: torch.device) -> TokenSampler:
        settings = SamplingSettings(self.temperature, self.top_p, self.seeds, self.generator).for_rows(rows)
        if settings.seeds is None:
            return TokenSampler(settings, MetaStream(self.generator), rows=rows, device=device)
        pads = self.pads or [0] * rows
        check_count("attention_mask", len(pads), rows)
        assert isinstance(settings.seeds, tuple)
        stream = PromptStreams(settings.seeds, [0] * rows, [-pad for pad in pads])
        return TokenSampler(settings, stream, rows=rows, device=device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their samplers anew: a thread's state cannot travel."""
        return {name: value for name, value in self.__dict__.items() if name != "_ready"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ready = threading.local()


def _check_scores(scores: Any) -> None:
    """Scores (B, V), or (rows, V) of continuous batching, floating-point, of one token at least."""
    if not (isinstance(scores, Tensor) and scores.is_floating_point()):
        found = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a floating-point tensor of shape (B, V), got {found}: pass the model's logits")
    if scores.dim() != 2 or not scores.shape[-1]:
        raise ValueError(f"scores must be of shape (B, V), got {tuple(scores.shape)}: add a batch dimension")


def _as_mask(attention_mask: Any) -> Tensor:
    """A mask as a tensor, from whatever holds its numbers."""
    try:
        return torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"attention_mask must be a tensor of shape (B, T), got {type(attention_mask).__name__}"
        ) from None


def _as_list(values: Any) -> Any:
    return list(values) if isinstance(values, tuple) else values


def _as_tuple(values: Any) -> Any:
    """A setting as it is now, whatever is done to its list later."""
    values = to_python(values)
    return tuple(values) if isinstance(values, list) else values


def _check_distributions(probs: Tensor) -> None:
    """Refuse what no token can be drawn from, as ``torch.multinomial`` does. probs: (B, V), on CPU."""
    total = probs.sum(-1)
    for row in (~((probs.amin(-1) >= 0) & (total > 0) & (total < math.inf))).nonzero()[:1, 0].tolist():
        if not torch.isfinite(probs[row]).all():
            raise ValueError(
                f"probs must be finite, but row {row} holds nan or inf: check the logits that they were made of"
            )
        raise ValueError(
            f"probs must be 0 or above and sum to 1, but row {row} has a minimum of {float(probs[row].min())} and sums "
            f"to {float(total[row])}: pass probabilities, such as torch.softmax(logits, dim=-1)"
        )


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw from the nucleus of each row: equal to the reference's ``sample_top_p`` bit for bit, ties included.

    Args:
        probs: (B, V) float32, each row summing to 1; not changed (the reference overwrites a sorted copy).
        p: from 0 to 1.
        generator: of the same device; torch's global one if not given. It is left as the reference leaves it.

    Returns:
        ids, LongTensor (B, 1).

    Raises:
        ValueError: `p` is outside [0, 1], `probs` is not of two dimensions, or (seen on CPU alone) a row of it is no
            distribution: nan, inf, negative, or all 0.
        TypeError: `probs` is no tensor, or `p` no number; bools and strings are none.

    >>> sample_top_p(torch.tensor([[0.1, 0.6, 0.3]]), 0.5)  # 0.6 is before 0.3, and more than 0.5
    tensor([[1]])
    """
    if not isinstance(probs, Tensor):
        raise TypeError(f"probs must be a tensor of shape (B, V), got {type(probs).__name__}: pass torch.tensor(probs)")
    if not probs.is_floating_point():
        raise TypeError(f"probs must be floating-point, got {probs.dtype}: pass probs.float(), of rows that sum to 1")
    if probs.dim() != 2:
        raise ValueError(
            f"probs must be of shape (B, V), got {tuple(probs.shape)}: add a batch dimension with probs[None]"
        )
    if not probs.numel():
        raise ValueError(f"probs must hold at least one row and one token, got {tuple(probs.shape)}: drop the call")
    p, probs = check_top_p(p), probs.detach().float()
    check_generator(generator, probs.device)
    if fast_path.on_cpu(probs):
        _check_distributions(probs)
    if probs.is_contiguous():
        noise = MetaStream(generator).step(probs.shape, probs.device, 0)
        draw: Draw = (fast_path if fast_path.on_cpu(probs) else rule).draw_by_rank(probs, p, noise)
        return draw.tokens[:, None]
    # torch sorts ties, sums, and fills with random numbers in memory's order: in another layout keep to its own steps.
    ordered, tokens = torch.sort(probs, dim=-1, descending=True)
    ordered.masked_fill_(ordered.cumsum(-1) - ordered > p, 0.0)
    ordered /= ordered.sum(-1, keepdim=True)
    return tokens.gather(1, torch.multinomial(ordered, num_samples=1, generator=generator))
