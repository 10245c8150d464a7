"""One run of the loop: how rows are laid out, what a step does, when a row is done, what comes back.

*reference* is the reference's schedule: all rows start at column 0, the loop starts at the shortest prompt's end, and
longer prompts are forced token by token. *padded* puts all prompts' ends into one column by left padding::

    reference  p p P P g g    padded    . . p p g g        p: prefilled   P: forced   g: generated
               p p p g g g              . p p p g g g      .: pad, masked
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StopStringCriteria,
)

from ..checks import nonfinite
from ..sampling.processors import Stream, for_rows, one_hot, sample
from ..sampling.streams import LookAhead, MetaStream, PromptStreams
from .options import HANDED_ON, device_of
from .scoring import TokenScores, concatenate, score, score_columns

TopLogprobs = list[tuple[int, float]]
_NEVER = torch.iinfo(torch.long).max


@dataclass
class Run:
    """What one call asks of the loop, and what its steps leave behind; tensors (B,) on the model's device."""

    prompts: list[list[int]]
    limits: list[int]  # most new tokens, per row
    padded: bool
    temperature: float | list[float]
    top_p: float | list[float]
    eos_ids: tuple[int, ...]
    pad_id: int  # of the answer; what the model is fed for rows that are done is `filler`
    filler: int
    wants_scores: bool
    top: int  # best tokens per position
    edited: bool  # other processors change logits before the draw
    device: torch.device
    generator: torch.Generator | None = None
    seeds: list[int] | None = None
    copies: list[int] = field(default_factory=list)  # which copy of its prompt a row is
    agree: Callable[[Tensor], Tensor] | None = None  # makes the ranks of a parallel model take the same tokens

    def __post_init__(self) -> None:
        self.lengths = [len(prompt) for prompt in self.prompts]
        self.shortest, self.longest = min(self.lengths), max(self.lengths)
        self.total_len = max(n + limit for n, limit in zip(self.lengths, self.limits, strict=True))
        # Column of the first new token, columns to make, and the column in which each row starts.
        self.start = self.longest if self.padded else self.shortest
        self.steps = max(self.limits) if self.padded else self.total_len - self.shortest
        self.offsets = [self.longest - n if self.padded else 0 for n in self.lengths]
        self.stream = self._stream()
        # On Meta's stream the reference schedule draws on beyond a row's limit until its EOS, as the reference does.
        self.limits_end_rows = self.padded or self.seeds is not None or self.temperature == 0
        # Column at which a row's completion begins, and at which its limit ends it.
        begins = [offset + n for offset, n in zip(self.offsets, self.lengths, strict=True)]
        ends = [begin + limit for begin, limit in zip(begins, self.limits, strict=True)]
        self.begin = torch.tensor(begins, device=self.device)
        self.end = torch.tensor(ends, device=self.device)
        # A row with nothing to generate is done from the start.
        self.done = (self.end <= self.start) & self.limits_end_rows
        self.stopped = torch.full_like(self.begin, _NEVER)  # column after the one where EOS or a criterion ended it
        self.by_criterion = torch.zeros_like(self.done)
        self.first_bad = torch.full_like(self.begin, _NEVER)
        self.eos = torch.tensor(self.eos_ids, dtype=torch.long, device=self.device)
        self.scores: list[TokenScores] = []
        self.drawn_with: list[Tensor] = []

    def _stream(self) -> Stream:
        if self.seeds is not None:
            return PromptStreams(self.seeds, self.copies, [-offset for offset in self.offsets])
        return LookAhead(self.lengths, self.start, self.generator) if self.padded else MetaStream(self.generator)

    def layout(self) -> tuple[Tensor, Tensor]:
        """Prompts as far as they are prefilled, and their mask: (B, start) each."""
        if not self.padded:
            ids = torch.tensor([prompt[: self.start] for prompt in self.prompts])
            return ids.to(self.device), torch.ones_like(ids).to(self.device)
        ids, mask = left_padded(self.prompts)
        return ids.to(self.device), mask.to(self.device)

    def forced(self) -> Tensor:
        """(B, longest): the prompts, with -1 beyond each one's end. Nothing is forced in the padded schedule."""
        rows = [prompt + [-1] * (self.longest - len(prompt)) for prompt in self.prompts]
        return torch.tensor(rows, device=self.device)

    def config(self, options: dict[str, Any]) -> GenerationConfig:
        """What transformers' loop is told: greedy, so many steps, no EOS (it would fire on one in a forced prompt)."""
        handed_on = {name: value for name, value in options.items() if name in HANDED_ON and value is not None}
        return GenerationConfig(do_sample=False, max_new_tokens=self.steps, return_dict_in_generate=True, **handed_on)

    def eos_processors(self, options: dict[str, Any]) -> list[LogitsProcessor]:
        """transformers' own processors that need the EOS ids, which the loop is not told."""
        processors: list[LogitsProcessor] = []
        if not self.eos_ids:
            return processors
        eos: Any = list(self.eos_ids)
        if options.get("min_length"):
            processors.append(MinLengthLogitsProcessor(options["min_length"], eos, device=str(self.device)))
        if options.get("min_new_tokens"):
            least = options["min_new_tokens"]
            processors.append(MinNewTokensLengthLogitsProcessor(self.start, least, eos, device=str(self.device)))
        if options.get("exponential_decay_length_penalty"):
            penalty = options["exponential_decay_length_penalty"]
            processors.append(ExponentialDecayLengthPenalty(penalty, eos, self.start))
        return processors

    def leave_generator(self, vocab_size: int) -> None:
        """After a padded run on Meta's stream, the generator as the reference's own schedule would leave it.

        The reference stops when every row has generated EOS, else at the total length. A row that ends at its limit
        might have met an EOS beyond it there; that cannot be known here.
        """
        if not isinstance(self.stream, LookAhead) or self.temperature == 0 or bool(self.by_criterion.any()):
            return
        stopped = self.stopped.tolist()
        if max(stopped) < _NEVER:
            lags = (n - self.shortest for n in self.lengths)
            steps = max(column - self.start + lag for column, lag in zip(stopped, lags, strict=True))
        else:
            steps = self.total_len - self.shortest
        self.stream.leave_after(steps, (len(self.prompts), vocab_size), self.device)


class Step(LogitsProcessor):
    """Draw every row's token, force the prompts' own, record; answer with one-hot rows."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.temperature = for_rows("temperature", run.temperature, len(run.prompts), run.device)
        self.top_p = for_rows("top_p", run.top_p, len(run.prompts), run.device)
        self.forced = None if run.padded or run.longest == run.shortest else run.forced()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns new float32 scores (B, V)."""
        run, column = self.run, input_ids.shape[1]
        logits = scores.float()
        # A finite sum has finite terms. Processors may set -inf on purpose, never nan or +inf.
        probe = logits.amax(-1) if run.edited else logits.sum(-1)
        bad = ~torch.isfinite(probe) & ~run.done & (column < run.end)  # beyond its limit a row's logits mean nothing
        run.first_bad = torch.where(bad, run.first_bad.clamp(max=column), run.first_bad)

        draw = sample(logits, self.temperature, self.top_p, run.stream, column)
        tokens, probs = draw.tokens, draw.probs
        if self.forced is not None and column < run.longest:
            given = self.forced[:, column]
            tokens, probs = torch.where(given >= 0, given, tokens), torch.where(given >= 0, 1.0, probs)
        # A row that is done goes on with pad, as in transformers; it is cut off in the end, and no row sees another.
        tokens = torch.where(run.done, run.filler, tokens)
        if run.agree is not None:
            tokens = run.agree(tokens)
        if run.wants_scores:
            run.scores.append(score(logits[:, None], tokens[:, None], run.top))
            run.drawn_with.append(probs)
        return one_hot(tokens, logits)


class Stop(StoppingCriteria):
    """A row is done when it *generates* EOS, meets a criterion of the caller's, or comes to its limit."""

    def __init__(self, run: Run, others: StoppingCriteriaList) -> None:
        self.run = run
        self.others = others

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: (B, T). Returns (B,) bool."""
        run, width = self.run, input_ids.shape[1]
        running = ~run.done & (run.begin < width)
        eos = running & torch.isin(input_ids[:, -1], run.eos)
        met = running & self.others(input_ids, scores, **kwargs).to(run.device) if self.others else eos
        run.stopped = torch.where(eos | met, width, run.stopped)
        run.by_criterion |= met & ~eos & (width <= run.end)
        run.done = run.done | eos | met | (run.end <= width if run.limits_end_rows else False)
        return run.done


def criteria(options: dict[str, Any], to_loop: dict[str, Any]) -> StoppingCriteriaList:
    """The caller's stopping criteria, stop strings among them."""
    listed = list(to_loop.get("stopping_criteria") or [])
    if options.get("stop_strings"):
        if to_loop.get("tokenizer") is None:
            raise ValueError("stop_strings are text, so generate needs the model's tokenizer: pass tokenizer=")
        listed.append(StopStringCriteria(to_loop["tokenizer"], options["stop_strings"]))
    return StoppingCriteriaList(listed)


@dataclass
class Rows:
    """What a run made, row by row: prompt and completion with its EOS, and scores beside each token."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    sampled_logprobs: list[list[float]]
    top_logprobs: list[list[TopLogprobs]]
    stopped: list[bool]  # by a criterion of the caller's


def collect(
    run: Run, sequences: Tensor, head: TokenScores | None, prompt_rows: list["Scored"] | None, *, unshifted: bool
) -> Rows:
    """Rows out of columns.

    Args:
        sequences: (B, T) ids, as laid out.
        head: the scores of columns 1 to start - 1 (or, unshifted, of all), if they were asked for.
        prompt_rows: the prompts' scores, if they were computed apart.
    """
    width = sequences.shape[1]
    first_bad = run.first_bad.tolist()
    for row, column in enumerate(first_bad):
        if column < min(width, _NEVER):
            raise nonfinite(row, column - run.offsets[row])
    ends = torch.minimum(torch.minimum(run.end, run.stopped), torch.tensor(width)).tolist()
    spans = [slice(offset, end) for offset, end in zip(run.offsets, ends, strict=True)]
    tokens = [row[span] for row, span in zip(sequences.tolist(), spans, strict=True)]
    rows = Rows(tokens, [], [], [], run.by_criterion.tolist())
    if not run.wants_scores:
        return rows
    blank = width - (0 if head is None else head.logprobs.shape[1]) - min(len(run.scores), width - run.start)
    columns = concatenate(
        [
            *[unscored(len(tokens), blank, run.top, run.device)] * (blank > 0),
            *([] if head is None else [head]),
            *run.scores[: width - run.start],
        ]
    )
    drawn = torch.stack(run.drawn_with[: width - run.start], 1).log() if run.drawn_with else columns.logprobs[:, :0]
    for row, span in enumerate(spans):
        scored = scored_row(columns, row, span, unshifted=unshifted)
        if prompt_rows is not None:
            n = run.lengths[row]
            scored = Scored(
                prompt_rows[row].logprobs + scored.logprobs[n:], prompt_rows[row].top_logprobs + scored.top_logprobs[n:]
            )
        rows.logprobs.append(scored.logprobs)
        rows.top_logprobs.append(scored.top_logprobs)
        given = run.start - span.start
        rows.sampled_logprobs.append(([0.0] * given + drawn[row].tolist())[: len(tokens[row])])
    return rows


@dataclass
class Scored:
    """Scores beside one row's tokens."""

    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


def scored_row(scores: TokenScores, row: int, span: slice, *, unshifted: bool = False) -> Scored:
    """One row's scores as lists. The first token has nothing before it: 0.0, and no best tokens."""
    ids, best = scores.top_ids[row, span].tolist(), scores.top_logprobs[row, span].tolist()
    scored = Scored(
        scores.logprobs[row, span].tolist(), [list(zip(i, b, strict=True)) for i, b in zip(ids, best, strict=True)]
    )
    if not unshifted:
        scored.logprobs[0], scored.top_logprobs[0] = 0.0, []
    return scored


def unscored(rows: int, columns: int, top: int, device: torch.device) -> TokenScores:
    """Columns without scores: logprob 0.0."""
    best = torch.zeros(rows, columns, top, device=device)
    return TokenScores(torch.zeros(rows, columns, device=device), best.long(), best)


def score_prompts(
    model: Any, prompts: list[list[int]], *, top: int, chunk_bytes: int, model_kwargs: dict[str, Any] | None = None
) -> list[Scored]:
    """Scores of whole prompts, right-padded: what follows a token cannot change its score, so no mask is needed."""
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device_of(model))
    mask = torch.tensor(
        [[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device_of(model)
    )
    parts = [unscored(len(prompts), 1, top, device_of(model))]
    if longest > 1:
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
    return [scored_row(columns, row, slice(0, len(prompt))) for row, prompt in enumerate(prompts)]


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, longest) ids and their mask. Each row is filled with its own first token, which is masked.

    Other processors see the ids: a pad token would count as a token of the text for a repetition penalty.
    """
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[prompt[0]] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
    return ids, mask


def in_one_tensor(texts: Sequence[Sequence[int]], lengths: Sequence[int], pad_id: int) -> Tensor:
    """(B, T) in transformers' convention: prompts of `lengths` end in one column, completions are followed by pad."""
    longest = max(lengths)
    rows = [[pad_id] * (longest - n) + list(text) for text, n in zip(texts, lengths, strict=True)]
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
