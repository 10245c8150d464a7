"""The loop: transformers' own `generate` with one processor that draws and one criterion that ends rows.

transformers runs it: caches, masks, streamers, other processors, quantization and offload are its business. What this
module does not do: it lays out no prompt (see `plan`) and cuts no answer (see `rows`, `trimming`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation import (
    ExponentialDecayLengthPenalty,
    GenerateDecoderOnlyOutput,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StopStringCriteria,
)

from ..sampling.rule import Draw
from ..sampling.sampler import Stream, TokenSampler, one_hot
from ..sampling.streams import LookAhead, MetaStream, PromptStreams
from .options import FOR_THE_LOOP, Call
from .plan import Plan
from .scoring import PromptScores, TokenScores, prefill_scores, score

NEVER = torch.iinfo(torch.long).max  # a column that no run comes to
_HANDED_ON = ("prefix_allowed_tokens_fn", "synced_gpus", "streamer")
_EXTRAS = ("logits", "attentions", "hidden_states", "past_key_values")


@dataclass
class LoopState:
    """What the steps of one run write. Tensors are (B,), on the plan's device."""

    done: Tensor  # bool: rows that take no further token
    stopped: Tensor  # the column after the one where EOS or a criterion ended the row; NEVER if none did
    by_criterion: Tensor  # bool: rows that a criterion of the caller's ended
    first_bad: Tensor  # the first column whose logits held nan or inf; NEVER if none did
    scores: list[TokenScores] = field(default_factory=list)  # of each step's tokens, (B, 1) each
    drawn_with: list[Tensor] = field(default_factory=list)  # the probability that each step's tokens were drawn with

    @staticmethod
    def before(plan: Plan) -> "LoopState":
        """The state before the first step. A row with nothing to generate is done from the start."""
        never = torch.full_like(plan.begins, NEVER)
        done = (plan.ends <= plan.start) & plan.limits_end_rows
        return LoopState(done=done, stopped=never, by_criterion=torch.zeros_like(done), first_bad=never)


class SamplingProcessor(LogitsProcessor):
    """Draw every row's token, force the prompts' own, record; answer with one-hot rows."""

    def __init__(self, plan: Plan, state: LoopState, stream: Stream) -> None:
        self.plan, self.state = plan, state
        self.sampler = TokenSampler(plan.sampling, stream, rows=len(plan.prompts), device=plan.device)
        self.forced = plan.forced()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns new float32 scores (B, V)."""
        plan, state, column = self.plan, self.state, input_ids.shape[1]
        logits = scores.float()
        draw = self.sampler(logits, column, with_mass=plan.wants_scores)
        self._note_nonfinite(logits, draw, column)
        tokens, given = draw.tokens, None
        if self.forced is not None and column < plan.longest:
            given = self.forced[:, column]
            tokens = torch.where(given >= 0, given, tokens)
        # A row that is done goes on with pad, as in transformers; it is cut off in the end, and no row sees another.
        tokens = torch.where(state.done, plan.fill_id, tokens)
        if plan.broadcast_tokens is not None:
            tokens = plan.broadcast_tokens(tokens)
        if plan.wants_scores:
            state.scores.append(score(logits[:, None], tokens[:, None], plan.top_logprobs))
            state.drawn_with.append(draw.probs if given is None else torch.where(given >= 0, 1.0, draw.probs))
        return one_hot(tokens, logits)

    def _note_nonfinite(self, logits: Tensor, draw: Draw, column: int) -> None:
        """Keep the first column in which a row's logits hold nan or inf; beyond its limit they mean nothing."""
        state = self.state
        # nan and +inf show in the softmax. Processors may set -inf on purpose; a model's own logits are finite.
        probe = draw.softmax_probs if self.plan.edited else draw.softmax_probs + logits.amin(-1)
        bad = ~torch.isfinite(probe) & ~state.done & (column < self.plan.ends)
        state.first_bad = torch.where(bad, state.first_bad.clamp(max=column), state.first_bad)


class RowStoppingCriteria(StoppingCriteria):
    """End a row when it *generates* EOS, meets a criterion of the caller's, or comes to its limit."""

    def __init__(self, plan: Plan, state: LoopState, others: StoppingCriteriaList) -> None:
        self.plan, self.state, self.others = plan, state, others

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: (B, T). Returns (B,) bool."""
        plan, state, width = self.plan, self.state, input_ids.shape[1]
        running = ~state.done & (plan.begins < width)
        eos = running & torch.isin(input_ids[:, -1], plan.eos)
        met = running & self.others(input_ids, scores, **kwargs).to(plan.device) if self.others else eos
        state.stopped = torch.where(eos | met, width, state.stopped)
        state.by_criterion |= met & ~eos & (width <= plan.ends)
        state.done = state.done | eos | met | (plan.ends <= width if plan.limits_end_rows else False)
        return state.done


@dataclass
class Finished:
    """A run that has ended."""

    state: LoopState
    sequences: Tensor  # (B, T) ids, as the plan lays them out
    prompt_scores: PromptScores
    extras: dict[str, Any]  # logits, attentions, hidden states and the cache, where transformers gives them


def run_loop(model: Any, generate: Callable[..., Any], plan: Plan, call: Call) -> Finished:
    """Prefill where prompts are scored, let transformers' loop generate the rest, leave the generator as it should be.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate`, of that model with an empty generation config.
        plan: what to do.
        call: the keywords that go to the loop and to the model.

    Raises:
        ValueError: a cache in the call does not fit the prompts, or the prompts' logits hold nan or inf.
    """
    _check_cache(plan, call)
    ids, mask = plan.layout()
    prompt_scores, cache = prefill_scores(model, plan, call, ids, mask)
    state, stream = LoopState.before(plan), random_stream(plan)
    if plan.steps:
        arguments = _loop_arguments(plan, call, state, stream)
        output = generate(ids, attention_mask=mask, **arguments, **cache)
    else:
        output = GenerateDecoderOnlyOutput(sequences=ids)
        stream_prompts(ids, call)
    leave_generator(plan, state, stream)
    # Attentions of a ragged batch in the reference schedule do not line up with rows, so omit them.
    lines_up = plan.padded or not plan.ragged
    extras = {name: output[name] for name in _EXTRAS if lines_up and output.get(name) is not None}
    return Finished(state, output.sequences, prompt_scores, extras)


def _loop_arguments(plan: Plan, call: Call, state: LoopState, stream: Stream) -> dict[str, Any]:
    """The keywords of transformers' `generate` that make it run this plan."""
    processors = [
        *eos_processors(plan, call),
        *(call.to_loop.get("logits_processor") or []),
        SamplingProcessor(plan, state, stream),
    ]
    return {
        "generation_config": loop_config(plan, call),
        "logits_processor": processors,
        "stopping_criteria": [RowStoppingCriteria(plan, state, callers_criteria(call))],
        **{name: call.to_loop[name] for name in _HANDED_ON if call.to_loop.get(name) is not None},
        **{name: value for name, value in call.to_model.items() if name != "past_key_values"},
    }


def _check_cache(plan: Plan, call: Call) -> None:
    """Refuse a cache in the call that does not fit: the whole text comes with it, at least one token of it new."""
    cache = call.to_model.get("past_key_values")
    if cache is None:
        return
    if plan.ragged and not plan.padded:
        raise ValueError('past_key_values of a ragged batch is left-padded: take schedule="padded", or drop the cache')
    held = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if held >= plan.start:
        raise ValueError(
            f"past_key_values must hold fewer tokens than the prompts, got {held} for prompts of {plan.start}: pass "
            "the whole text, what the cache holds included"
        )


def stream_prompts(ids: Tensor, call: Call) -> None:
    """Give a streamer the prompts (B, T) of a call that generates nothing."""
    streamer = call.to_loop.get("streamer")
    if streamer is not None:
        streamer.put(ids.cpu())
        streamer.end()


def loop_config(plan: Plan, call: Call) -> GenerationConfig:
    """The config of transformers' loop: greedy, so many steps, no EOS (it would fire on one in a forced prompt)."""
    options = {name: value for name, value in call.options.items() if name in FOR_THE_LOOP and value is not None}
    return GenerationConfig(do_sample=False, max_new_tokens=plan.steps, return_dict_in_generate=True, **options)


def eos_processors(plan: Plan, call: Call) -> list[LogitsProcessor]:
    """transformers' own processors that need the EOS ids, which the loop is not told."""
    processors: list[LogitsProcessor] = []
    options, device, eos = call.options, str(plan.device), list(plan.eos_ids)
    if not eos:
        return processors
    if options.get("min_length"):
        processors.append(MinLengthLogitsProcessor(options["min_length"], eos, device=device))
    if options.get("min_new_tokens"):
        processors.append(MinNewTokensLengthLogitsProcessor(plan.start, options["min_new_tokens"], eos, device=device))
    if options.get("exponential_decay_length_penalty"):
        penalty = options["exponential_decay_length_penalty"]
        processors.append(ExponentialDecayLengthPenalty(penalty, eos, plan.start))
    return processors


def callers_criteria(call: Call) -> StoppingCriteriaList:
    """The caller's stopping criteria, stop strings among them."""
    listed = list(call.to_loop.get("stopping_criteria") or [])
    if call.options.get("stop_strings"):
        if call.to_loop.get("tokenizer") is None:
            raise ValueError("stop_strings are text, so generate needs the model's tokenizer: pass tokenizer=")
        listed.append(StopStringCriteria(call.to_loop["tokenizer"], call.options["stop_strings"]))
    return StoppingCriteriaList(listed)


def random_stream(plan: Plan) -> Stream:
    """The random numbers of a run: one stream per row with seeds, else Meta's, looked ahead where rows run ahead."""
    sampling = plan.sampling
    if sampling.seeds is not None:
        assert not isinstance(sampling.seeds, int), "a plan has one seed per row"
        return PromptStreams(sampling.seeds, plan.copies, [-offset for offset in plan.offsets])
    return LookAhead(plan.lengths, plan.start, sampling.generator) if plan.padded else MetaStream(sampling.generator)


def leave_generator(plan: Plan, state: LoopState, stream: Stream) -> None:
    """After a padded run on Meta's stream, leave the generator as the reference's own schedule would.

    The reference stops when every row has generated EOS, else at the total length. A row that ends at its limit might
    have met an EOS beyond it there; that cannot be known here.
    """
    if not isinstance(stream, LookAhead) or plan.sampling.temperature == 0 or bool(state.by_criterion.any()):
        return
    stopped = state.stopped.tolist()
    if max(stopped) < NEVER:
        lags = (length - plan.shortest for length in plan.lengths)
        steps = max(column - plan.start + lag for column, lag in zip(stopped, lags, strict=True))
    else:
        steps = plan.total_len - plan.shortest
    stream.leave_after(steps, (len(plan.prompts), plan.vocab_size), plan.device)
