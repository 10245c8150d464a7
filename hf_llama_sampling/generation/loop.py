"""The loop: transformers' own `generate` with one processor that draws and one criterion that ends rows.

transformers runs it: caches, masks, streamers, other processors, quantization and offload are its business. What this
module does not do: it lays out no prompt (see `plan`) and cuts no answer (see `rows`, `trimming`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..checks import nonfinite, nothing_left
from ..sampling import fast_path
from ..sampling.rule import Draw
from ..sampling.sampler import Stream, TokenSampler
from ..sampling.streams import LookAhead, MetaStream, PromptStreams
from .adapters import keeps_soft_prompts_in_cache, soft_prompts_of
from .caches import room_of, rows_of
from .callers_cache import refuse_another_text
from .edits import CallersCriteria, LogitEdits
from .inference import as_ordinary
from .inputs import beside_tokens, lay_out_beside_tokens
from .model_info import forget_longer_texts, length_limit
from .options import CACHING, FOR_THE_LOOP, Call
from .plan import Plan
from .probe import Probe
from .prompt_cache import ReadTexts
from .releases import CACHE_NAME, cache_in
from .scoring import PromptScorer, RowScores, TokenScores, bytes_for, chunk_of, score, score_prompts
from .sharing import leaves_cache, share_prefill
from .streamers import WithPrompts

NEVER = torch.iinfo(torch.long).max  # larger than any column
_HANDED_ON = ("synced_gpus", "streamer")
_EXTRAS = ("logits", "attentions", "hidden_states", CACHE_NAME)


@dataclass
class LoopState:
    """Collects what the steps of one run record. Tensors are (B,), on the plan's device.

    Does not store where EOS ended a row: `row_stops` finds it in the tokens.
    """

    done: Tensor  # bool: rows that take no further token
    criterion_stops: Tensor  # the column after the one where a criterion of the caller's ended the row, else NEVER
    finite_checks: list[Tensor] = field(default_factory=list)  # per step, off the CPU: finite if the row's logits are
    logits: Tensor | None = None  # of the last step, after edits, (B, V)
    unsound: Tensor | None = None  # (), bool, off the CPU: whether the last step's logits held nan or inf
    scores: list[TokenScores] = field(default_factory=list)  # of each step's tokens, (B, 1) each
    softmax_probs: list[Tensor] = field(default_factory=list)  # of each step's tokens after temperature
    nucleus_masses: list[Tensor] = field(default_factory=list)  # of the nucleus that each step's tokens were drawn from

    @staticmethod
    def before(plan: Plan) -> "LoopState":
        """The state before the first step. A row with nothing to generate is done from the start."""
        done = (plan.ends <= plan.start) & plan.limits_end_rows
        return LoopState(done=done, criterion_stops=torch.full_like(plan.begins, NEVER))

    @property
    def by_criterion(self) -> list[bool]:
        """Which rows a criterion of the caller's ended."""
        return (self.criterion_stops < NEVER).tolist()


class SamplingProcessor(LogitsProcessor):
    """Draw each row's token, or force its prompt's; record the scores; return them as one-hot logits."""

    def __init__(self, plan: Plan, state: LoopState, stream: Stream, edits: LogitEdits) -> None:
        self.plan, self.state, self.edits = plan, state, edits
        self.sampler = TokenSampler(plan.sampling, stream, rows=len(plan.prompts), device=plan.device)
        self.forced = plan.forced()
        self.first_end = min(_end_columns(plan))
        self.no_token: Tensor | None = None  # (B, V): -inf

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns new float32 scores (B, V)."""
        plan, state, column = self.plan, self.state, input_ids.shape[1]
        logits = scores.float()
        if self.edits:
            logits = self.edits(input_ids, logits, state.done)
        state.logits = logits
        draw = self.sampler(logits, column, with_mass=plan.wants_scores)
        self._look_for_nonfinite(logits, draw, column, scores)
        tokens, given = draw.tokens, None
        if self.forced is not None and column < plan.longest:
            given = self.forced[:, column]
            tokens = torch.where(given >= 0, given, tokens)
        # Feed pad to rows that are done, as transformers does; the pads are cut off at the end.
        tokens = tokens.masked_fill(state.done, plan.fill_id)
        if plan.broadcast_tokens is not None:
            tokens = plan.broadcast_tokens(tokens)
        if plan.wants_scores:
            self._record(logits, tokens, draw, None if given is None else given >= 0)
        if self.no_token is None:
            self.no_token = torch.full_like(logits, -torch.inf)
        return self.no_token.scatter(1, tokens[:, None], 0.0)

    def _record(self, logits: Tensor, tokens: Tensor, draw: Draw, forced: Tensor | None) -> None:
        """Record the scores and the draw of a step's tokens (B,); `forced` (B,) ones were not drawn: probability 1."""
        asked = self.plan.asked
        self.state.scores.append(score(logits[:, None], tokens[:, None], asked.ids[:, None], asked.top))
        assert draw.nucleus_mass is not None
        probs, mass = draw.softmax_probs, draw.nucleus_mass
        if forced is not None:
            probs, mass = torch.where(forced, 1.0, probs), torch.where(forced, 1.0, mass)
        self.state.softmax_probs.append(probs)
        self.state.nucleus_masses.append(mass)

    def _look_for_nonfinite(self, logits: Tensor, draw: Draw, column: int, raw: Tensor) -> None:
        """Check a step's logits for nan and inf, except in rows that are done or beyond their limit.

        Raise here on CPU, where reading a tensor is free. Elsewhere set `unsound`: the criterion ends the run at the
        loop's own sync, then `refuse_nonfinite` raises.
        """
        plan, state = self.plan, self.state
        # The softmax turns nan and +inf into nan; `amin` also finds -inf, which edits may set on purpose.
        check = draw.softmax_probs if self.edits else draw.softmax_probs + logits.amin(-1)
        on_cpu = fast_path.on_cpu(check)
        if on_cpu and all(map(math.isfinite, check.tolist())):
            return
        ignored = state.done | (plan.ends <= column) if column >= self.first_end else state.done
        check = check.masked_fill(ignored, 0.0)
        if on_cpu:
            _refuse_nonfinite(plan, check.tolist(), column, self.edits.names if self.edits else "", raw)
        else:
            state.finite_checks.append(check)
            state.unsound = check.sum().abs() >= torch.inf


class RowStoppingCriteria(StoppingCriteria):
    """End a row when it *generates* EOS, meets a criterion of the caller's, or reaches its limit."""

    def __init__(self, plan: Plan, state: LoopState, others: CallersCriteria, events: Any = None) -> None:
        self.plan, self.state, self.others, self.events = plan, state, others, events
        self.end_columns = _end_columns(plan) if plan.limits_end_rows else set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """input_ids: (B, T). Returns (B,) bool."""
        plan, state, width = self.plan, self.state, input_ids.shape[1]
        ended = None
        if plan.eos_ids:
            ended = torch.isin(input_ids[:, -1], plan.eos)
            if width <= plan.longest:  # ignore an EOS that is part of the row's own prompt
                ended &= plan.begins < width
        if self.others:
            counts = ~state.done & (plan.begins < width) & (width <= plan.ends)
            met = counts & self.others(input_ids, counts, state.logits, **kwargs)
            met = met if ended is None else met & ~ended
            state.criterion_stops = torch.where(met, width, state.criterion_stops)
            ended = met if ended is None else ended | met
        if width in self.end_columns:
            state.done = state.done | (plan.ends <= width)
        if ended is not None:
            state.done = state.done | ended
        if self.events is not None:
            met = torch.tensor(self.events.step(input_ids), device=state.done.device)
            state.criterion_stops = torch.where(met, width, state.criterion_stops)
            state.done = state.done | met
        return state.done if state.unsound is None else state.done | state.unsound


def _end_columns(plan: Plan) -> set[int]:
    """Return `plan.ends` as a set of ints, without reading the device."""
    parts = zip(plan.offsets, plan.lengths, plan.limits, strict=True)
    return {offset + length + limit for offset, length, limit in parts}


def row_stops(plan: Plan, state: LoopState, sequences: Tensor) -> list[int]:
    """Find where EOS or a criterion ended each row: the column after it, or NEVER. sequences: (B, T)."""
    eos_ids, stops = set(plan.eos_ids), []
    for row, (text, by_criterion) in enumerate(zip(sequences.tolist(), state.criterion_stops.tolist(), strict=True)):
        begin = plan.offsets[row] + plan.lengths[row]
        # Search up to the limit only: pads follow it, and the pad id may be an EOS id.
        end = min(len(text), begin + plan.limits[row]) if plan.limits_end_rows else len(text)
        by_eos = (column + 1 for column in range(begin, end) if text[column] in eos_ids)
        stops.append(min(next(by_eos, NEVER), by_criterion))
    return stops


def row_spans(plan: Plan, stops: list[int], width: int) -> list[slice]:
    """Compute the columns of each row's text, its EOS included, in a run of `width` columns."""
    ends = [min(end, stop, width) for end, stop in zip(plan.ends.tolist(), stops, strict=True)]
    return [slice(offset, end) for offset, end in zip(plan.offsets, ends, strict=True)]


def refuse_nonfinite(plan: Plan, state: LoopState, steps: int, edits: str = "") -> None:
    """After a run off the CPU, raise if the logits of one of its steps held nan or inf."""
    checks = torch.stack(state.finite_checks).tolist()[:steps] if state.finite_checks else []
    for step, check in enumerate(checks):
        _refuse_nonfinite(plan, check, plan.start + step, edits)


def _refuse_nonfinite(plan: Plan, check: list[float], column: int, edits: str, raw: Tensor | None = None) -> None:
    """Raise for the first row whose check of a column is not finite; name the edits of logits if they may be the cause.

    raw: (B, V), the logits before the edits, if known.
    """
    for row, value in enumerate(check):
        if math.isfinite(value):
            continue
        sound = raw is None or bool(torch.isfinite(raw[row]).all())
        if edits and sound:
            raise nothing_left(plan.row_ids[row], column - plan.offsets[row], edits, known=raw is not None)
        raise nonfinite(plan.row_ids[row], column - plan.offsets[row])


class PromptScores(NamedTuple):
    """Scores of a batch's prompts, by column or by row; both fields are None if no scores were asked for."""

    columns: TokenScores | None = None  # of columns 1 to start - 1, as the plan lays them out
    rows: list[RowScores] | None = None  # of each whole prompt


@dataclass
class Finished:
    """A run that has ended."""

    state: LoopState
    stops: list[int]  # the column after the one where EOS or a criterion ended each row; NEVER if none did
    sequences: Tensor  # (B, T) ids, as the plan lays them out
    prompt_scores: PromptScores
    extras: dict[str, Any]  # logits, attentions, hidden states and the cache, where transformers gives them


def run_loop(
    model: Any, generate: Callable[..., Any], plan: Plan, call: Call, texts: ReadTexts | None = None
) -> Finished:
    """Run a plan in transformers' loop; score the prompts too if the answer echoes them with scores.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model, which takes an `observer`.
        plan: the rows, their layout and their settings.
        call: the keywords that go to the loop and to the model.
        texts: prefilled texts of earlier calls; this run adds its own.

    Raises:
        ValueError: a cache or a chunk size in the call does not fit the prompts, or logits hold nan or inf.
    """
    _check_soft_prompts(model, call)
    _check_cache(plan, call)
    _check_parts(model, generate, plan, call)
    _check_inputs(plan, call)
    _check_extras(plan, call)
    if length_limit(model) is not None:
        forget_longer_texts(model)
    if not plan.steps:
        return _without_steps(model, generate, plan, call)
    ids, mask = plan.layout
    state, stream = LoopState.before(plan), random_stream(plan)
    scorer, prompt_rows = None, None
    if plan.echo and plan.wants_scores:
        if call.to_model.get(CACHE_NAME) is not None:  # the loop does not forward what a cache holds
            prompt_rows = _score_prompts(model, generate, plan, call)
        elif plan.start > 1:
            scorer = _prompt_scorer(model, generate, plan, call, ids)
    arguments = _loop_arguments(model, plan, call, (state, stream), scorer)
    edits: LogitEdits = arguments["logits_processor"][0].edits
    if call.events is not None:
        call.events.begin(plan, state, scorer, prompt_rows)
    shared = share_prefill(model, generate, plan, call, scored=scorer is not None, texts=texts)
    if shared is not None:
        arguments[CACHE_NAME] = shared.cache
        if scorer is not None:
            scorer.take(shared.scores, shared.bad)
    try:
        output = generate(ids, attention_mask=mask, observer=scorer, **arguments)
    except AttributeError as error:
        if call.options.get("output_attentions") and error.name == "attentions":
            raise ValueError(
                f"output_attentions needs a model with attentions, and {type(model).__name__} has none: leave it out"
            ) from error
        raise
    for name in [name for name in _EXTRAS if output.get(name) is not None]:
        output[name] = as_ordinary(output[name])
    refuse_nonfinite(plan, state, output.sequences.shape[1] - plan.start, edits.names)
    stops = row_stops(plan, state, output.sequences)
    leave_generator(plan, stops, by_criterion=any(state.by_criterion), stream=stream)
    if texts is not None and leaves_cache(call):
        texts.add(cache_in(output), output.sequences, row_spans(plan, stops, output.sequences.shape[1]))
    extras = {name: output[name] for name in _EXTRAS if output.get(name) is not None}
    if plan.forced() is not None:  # its columns do not line up with rows; asked for, others than logits are refused
        extras = {"logits": _by_new_token(plan, output.logits)} if "logits" in extras else {}
    columns = None if scorer is None else scorer.scores(plan.offsets)
    return Finished(state, stops, output.sequences, PromptScores(columns, prompt_rows), extras)


def _by_new_token(plan: Plan, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Arrange a reference run's logits, (B, V) a column, by new token: as many tuples as follow the longest prompt."""
    lags = [length - plan.shortest for length in plan.lengths]
    new = len(logits) - max(lags)
    return tuple(torch.stack([logits[lag + at][row] for row, lag in enumerate(lags)]) for at in range(new))


def _without_steps(model: Any, generate: Callable[..., Any], plan: Plan, call: Call) -> Finished:
    """Finish a run with nothing to generate; score the prompts if the answer echoes them with scores."""
    ids, _ = plan.layout
    state = LoopState.before(plan)
    rows = _score_prompts(model, generate, plan, call) if plan.echo and plan.wants_scores else None
    stream_prompts(plan.shown, call)
    stops = row_stops(plan, state, ids)
    leave_generator(plan, stops, by_criterion=False, stream=random_stream(plan))
    return Finished(state, stops, ids, PromptScores(rows=rows), {})


def _score_prompts(model: Any, generate: Callable[..., Any], plan: Plan, call: Call) -> list[RowScores]:
    """Score whole prompts in a separate run without the caller's cache."""
    others = {name: value for name, value in call.to_model.items() if name != CACHE_NAME}
    return score_prompts(
        model, generate, plan.prompts, asked=plan.asked, chunk_bytes=plan.chunk_bytes, model_kwargs=others
    )


def _prompt_scorer(model: Any, generate: Callable[..., Any], plan: Plan, call: Call, ids: Tensor) -> PromptScorer:
    """Make a scorer of the prefilled columns, in chunks if their logits do not fit `chunk_bytes`."""
    asked = call.options
    # Do not chunk if attentions or hidden states are returned: they must come from one forward.
    whole = asked.get("output_attentions") or asked.get("output_hidden_states")
    typed = bool(beside_tokens(call.to_model))
    chunk = None if whole else chunk_of(model, generate, ids, plan.chunk_bytes, whole=typed)
    if chunk is not None and asked.get("use_cache") is False:
        raise ValueError(
            "use_cache=False reads a prompt at once, and its logits do not fit chunk_bytes: leave use_cache out, or "
            f"raise chunk_bytes, here to {bytes_for(len(ids), plan.scored_size, ids.shape[1])}"
        )
    sizes = [size for size in (chunk, asked.get("prefill_chunk_size")) if size]
    return PromptScorer(
        type(model).__name__,
        ids[:, 1:],
        columns=plan.start,
        chunk=min(sizes, default=None),
        asked=plan.asked,
        chunk_bytes=plan.chunk_bytes,
    )


def _loop_arguments(
    model: Any, plan: Plan, call: Call, run: tuple[LoopState, Stream], scorer: PromptScorer | None
) -> dict[str, Any]:
    """Build the keywords with which transformers' `generate` runs this plan."""
    state, stream = run
    config = loop_config(plan, call)
    if scorer is not None and scorer.chunk < scorer.columns:
        config.prefill_chunk_size = scorer.chunk
    handed_on = {name: call.to_loop[name] for name in _HANDED_ON if call.to_loop.get(name) is not None}
    if "streamer" in handed_on:
        handed_on["streamer"] = WithPrompts(handed_on["streamer"], plan.shown.cpu())
    return {
        "generation_config": config,
        "logits_processor": [SamplingProcessor(plan, state, stream, LogitEdits(model, plan, call))],
        "stopping_criteria": [RowStoppingCriteria(plan, state, CallersCriteria(plan, call), call.events)],
        **handed_on,
        **lay_out_beside_tokens(call.to_model, plan.layout[1]),
    }


def _check_soft_prompts(model: Any, call: Call) -> None:
    """Refuse cache options beside soft prompts: PEFT needs an empty cache of the default kind."""
    soft_prompts = soft_prompts_of(model)
    if soft_prompts is None:
        return
    asked = [name for name in sorted(CACHING) if call.options.get(name)]
    asked += [CACHE_NAME] if call.to_model.get(CACHE_NAME) is not None else []
    if call.options.get("use_cache") is False and keeps_soft_prompts_in_cache(soft_prompts):
        asked.append("use_cache=False")
    for name in asked:
        raise ValueError(
            f"{name} has no place under a soft prompt, which PEFT puts into an empty cache of the usual kind: leave it "
            "out"
        )


def _check_cache(plan: Plan, call: Call) -> None:
    """Refuse a cache of other rows, without room, or that holds the whole prompt: one token must be left to forward."""
    kind = call.options.get("cache_implementation")
    if isinstance(kind, str) and "offloaded" in kind and plan.device.type == "cpu":
        raise ValueError(
            f"cache_implementation={kind!r} moves the cache between a device and the CPU, and this model is on the "
            "CPU: leave it out"
        )
    cache = call.to_model.get(CACHE_NAME)
    if cache is None:
        return
    if plan.ragged and not plan.padded:
        raise ValueError('past_key_values of a ragged batch is left-padded: take schedule="padded", or drop the cache')
    held = _length_of(cache)
    if held >= plan.start:
        raise ValueError(
            f"past_key_values must hold fewer tokens than the prompts, got {held} for prompts of {plan.start}: pass "
            "the whole text, what the cache holds included"
        )
    rows, room = rows_of(cache), room_of(cache)
    if rows not in (None, len(plan.prompts)):
        raise ValueError(
            f"past_key_values must hold one row per row of the batch, copies of num_return_sequences among them, got "
            f"{rows} for {len(plan.prompts)}: cache.batch_repeat_interleave(n) repeats rows"
        )
    if room is not None and room < plan.start + plan.steps - 1:
        raise ValueError(
            f"past_key_values must have room for prompts and new tokens, and a cache of {room} tokens is given for "
            f"{plan.start} + {plan.steps}: make it larger"
        )


def _check_parts(model: Any, generate: Callable[..., Any], plan: Plan, call: Call) -> None:
    """Refuse a cache or a chunk size for a model whose logits change if a prompt is forwarded in parts."""
    probe, name = Probe(model, generate), type(model).__name__
    cache, chunk = call.to_model.get(CACHE_NAME), call.options.get("prefill_chunk_size")
    if cache is not None and not _takes_cache(probe, plan.start, _length_of(cache)):
        raise ValueError(
            f"past_key_values holds the beginning of prompts of {plan.start} tokens, and {name} goes on from it "
            "otherwise than it reads them at once: leave it out"
        )
    if cache is not None:
        refuse_another_text(model, generate, plan, cache, _length_of(cache))
    if chunk is not None and call.options.get("use_cache") is False:
        raise ValueError(
            f"prefill_chunk_size={chunk} reads prompts in chunks, which needs a cache, and use_cache=False gives none: "
            "leave one of the two out"
        )
    if chunk is not None and chunk < plan.start and not probe.reads_in_pieces(plan.start):
        raise ValueError(
            f"prefill_chunk_size={chunk} reads prompts of {plan.start} tokens in chunks, and {name} then answers "
            "otherwise than when it reads them at once: leave it out"
        )


def _takes_cache(probe: Probe, width: int, held: int) -> bool:
    """Whether prompts of `width` tokens may continue from a cache of their first `held` tokens."""
    if not held:
        return True
    takes = probe.goes_on_from_a_cache(width) if width - held == 1 else probe.reads_in_pieces(width)
    return takes and probe.resumes()


def _length_of(cache: Any) -> int:
    """Return the number of tokens in a caller's cache."""
    try:
        return int(cache.get_seq_length())
    except ValueError as error:  # states alone
        raise ValueError(
            "past_key_values must know how many tokens it holds, and a cache of recurrent states alone does not: leave "
            "it out"
        ) from error


def _check_extras(plan: Plan, call: Call) -> None:
    """Refuse attentions and hidden states of a ragged reference batch: they come by column, which rows do not share."""
    for name in ("output_attentions", "output_hidden_states"):
        if call.options.get(name) and plan.ragged and not plan.padded:
            raise ValueError(
                f"{name} needs prompts that end in one column, and those of a ragged batch do not in the reference "
                'schedule: take schedule="padded", or prompts of one length'
            )


def _check_inputs(plan: Plan, call: Call) -> None:
    """Refuse images and token types with chunks, copies or a ragged reference batch: they would not match."""
    typed = beside_tokens(call.to_model)
    if typed and call.options.get("prefill_chunk_size"):
        raise ValueError(
            f"{typed[0]} may let tokens of an image see each other, and prefill_chunk_size reads them in parts: leave "
            "prefill_chunk_size out"
        )
    for name, value in call.to_model.items():
        if name not in typed and (not isinstance(value, Tensor) or not value.dim() or name == CACHE_NAME):
            continue
        if plan.num_return_sequences > 1:
            raise ValueError(
                f"num_return_sequences repeats prompts, and not the {name} that goes with them: repeat both, or call "
                "once for each sequence"
            )
        if plan.ragged and not plan.padded:
            raise ValueError(
                f"{name} needs whole prompts at once, and in the reference schedule a ragged batch begins where its "
                'shortest prompt ends: take schedule="padded", or prompts of one length'
            )


def stream_prompts(ids: Tensor, call: Call) -> None:
    """Put the prompts (B, T) of a call that generates nothing into its streamer, and end it."""
    streamer = call.to_loop.get("streamer")
    if streamer is not None:
        streamer.put(ids.cpu())
        streamer.end()


def loop_config(plan: Plan, call: Call) -> GenerationConfig:
    """Make the loop's config: greedy, `plan.steps` tokens, no EOS (it would fire on an EOS in a forced prompt)."""
    options = {name: value for name, value in call.options.items() if name in FOR_THE_LOOP and value is not None}
    return GenerationConfig(do_sample=False, max_new_tokens=plan.steps, return_dict_in_generate=True, **options)


def random_stream(plan: Plan) -> Stream:
    """Choose the random stream: `PromptStreams` with seeds, `LookAhead` if padded, else `MetaStream`."""
    sampling = plan.sampling
    if sampling.seeds is not None:
        assert not isinstance(sampling.seeds, int), "a plan has one seed per row"
        return PromptStreams(sampling.seeds, plan.copies, [-offset for offset in plan.offsets])
    return LookAhead(plan.lengths, plan.start, sampling.generator) if plan.padded else MetaStream(sampling.generator)


def leave_generator(plan: Plan, stops: list[int], *, by_criterion: bool, stream: Stream) -> None:
    """After a padded run on Meta's stream, advance the generator as far as the reference schedule would.

    The reference stops when every row has generated EOS, else at the total length. It draws beyond a row's limit, and
    might draw an EOS there; this run cannot know, and assumes the total length.
    """
    if not isinstance(stream, LookAhead) or plan.sampling.temperature == 0 or by_criterion:
        return
    if max(stops) < NEVER:
        lags = (length - plan.shortest for length in plan.lengths)
        steps = max(column - plan.start + lag for column, lag in zip(stops, lags, strict=True))
    else:
        steps = plan.total_len - plan.shortest
    stream.leave_after(steps, (len(plan.prompts), plan.scored_size), plan.device)
