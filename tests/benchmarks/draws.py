"""A draw alone: logits in, one token per row out. No model."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from hf_llama_sampling.reference import reference_sample_top_p
from hf_llama_sampling.sampling.sampler import TokenSampler
from hf_llama_sampling.sampling.settings import SamplingSettings
from hf_llama_sampling.sampling.streams import MetaStream, PromptStreams

from .measure import Effort, Line, in_turn, line

TEMPERATURE, TOP_P = 0.6, 0.9
BATCHES = (1, 8)
PEAKED, FLAT = 3.0, 0.5  # standard deviations of the logits
COPIES = 4  # logits drawn from in turn, so that none stays in the nearest cache

_WARPERS = [TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)]


class Draws:
    """The four ways to draw from the same logits (B, V)."""

    def __init__(self, vocab: int, batch: int, deviation: float) -> None:
        generator = torch.Generator().manual_seed(vocab + batch)
        self.logits = [torch.randn(batch, vocab, generator=generator) * deviation for _ in range(COPIES)]
        settings, where = SamplingSettings(TEMPERATURE, TOP_P), {"rows": batch, "device": torch.device("cpu")}
        seeded = PromptStreams(list(range(batch)), [0] * batch, [0] * batch)
        self.seeds = TokenSampler(settings, seeded, **where)
        self.meta = TokenSampler(settings, MetaStream(None), **where)
        self.column = 0

    def _next(self) -> torch.Tensor:
        self.column += 1
        return self.logits[self.column % COPIES]

    def one_stream_per_prompt(self) -> torch.Tensor:
        """This package with ``seeds``."""
        return self.seeds(self._next(), self.column, with_mass=False).tokens

    def metas_stream(self) -> torch.Tensor:
        """This package without: the reference's draws."""
        return self.meta(self._next(), self.column, with_mass=False).tokens

    def transformers(self) -> torch.Tensor:
        """What `generate(do_sample=True)` does with a temperature and a top-p."""
        scores = self._next()
        for warper in _WARPERS:
            scores = warper(None, scores)
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)

    def reference(self) -> torch.Tensor:
        """The reference's `sample_top_p` with its softmax."""
        return reference_sample_top_p(torch.softmax(self._next() / TEMPERATURE, dim=-1), TOP_P)


def one_stream_per_prompt(
    effort: Effort, vocabularies: Sequence[int], deviation: float, at_most: float
) -> Iterator[Line]:
    """A draw with a seed per row against transformers'."""
    for vocab, batch in itertools.product(vocabularies, BATCHES):
        draws = Draws(vocab, batch, deviation)
        times = in_turn([draws.one_stream_per_prompt, draws.transformers], effort)
        what = _what("one stream per prompt", vocab, batch, deviation)
        yield line(what, "transformers' warpers and multinomial", at_most, *times)


def metas_stream(effort: Effort, vocabularies: Sequence[int], deviation: float, at_most: float) -> Iterator[Line]:
    """A draw on Meta's stream against the reference's function; the tokens must be the same."""
    for vocab, batch in itertools.product(vocabularies, BATCHES):
        draws = Draws(vocab, batch, deviation)
        assert _tokens(draws, draws.metas_stream) == _tokens(draws, draws.reference), "not bit-identical"
        times = in_turn([draws.metas_stream, draws.reference], effort)
        what = _what("Meta's stream", vocab, batch, deviation)
        yield line(what, "the reference's softmax and function", at_most, *times)


def _tokens(draws: Draws, draw: Callable[[], torch.Tensor]) -> list[int]:
    torch.manual_seed(0)
    draws.column = 0
    return torch.cat([draw().flatten() for _ in range(2 * COPIES)]).tolist()


def _what(stream: str, vocab: int, batch: int, deviation: float) -> str:
    kind = "peaked" if deviation == PEAKED else "flat"
    return f"a draw, {stream}, {kind} logits, V = {vocab:,}, B = {batch}"
