"""Call logits processors and the caller's stopping criteria with each row's own text, and nothing else.

In a ragged batch the loop's columns hold padding before a row's prompt (padded schedule), or only a part of it
(reference schedule). So processors and criteria are called with rows of one prompt length at a time, cut to their own
text, and not for rows that are still being forced, are done, or have reached their limit. What this module does not do:
it draws nothing, and it ends nothing at an EOS or a limit.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers import generation as hf
from transformers.generation import StopStringCriteria

from .option_values import check_allowed
from .options import NEEDING_EOS, Call
from .plan import Plan

# transformers' processors that keep a state for the whole batch, so they cannot be called for a part of it.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")

AllowedTokens = Callable[[int, Tensor], Sequence[int]]


@dataclass
class _Group:
    """Rows of one prompt length (and, where it matters, one limit), with transformers' processors made for them."""

    rows: Tensor  # (G,) indices into the batch
    length: int  # of their prompts
    begin: int  # the column in which their completions begin
    processors: list[Any]  # called with ids (G, T) and scores (G, V)


class LogitEdits:
    """All that edits the logits of a run, in transformers' order: options first, then the caller's processors."""

    def __init__(self, model: Any, plan: Plan, call: Call) -> None:
        self.plan = plan
        self.constraint = _Constraint(plan, call.to_loop.get("prefix_allowed_tokens_fn"))
        self.options = call.editing()
        by_options = bool(self.options) or self.constraint.allowed is not None
        self.groups = list(_groups(model, plan, call, self.constraint)) if by_options else []
        self.processors = list(map(_as_new, call.to_loop.get("logits_processor") or []))
        self.keeps_raw = bool(call.options.get("output_logits"))
        self.of_length = for_each_length(self.processors, plan)
        if plan.ragged:
            _refuse_stateful(self.processors)

    def __bool__(self) -> bool:
        return bool(self.groups or self.processors)

    @property
    def names(self) -> str:
        """Names of the edits, for errors."""
        constraint = ["prefix_allowed_tokens_fn"] if self.constraint.allowed is not None else []
        return ", ".join([*self.options, *constraint, *map(_name_of, self.processors)])

    def __call__(self, input_ids: Tensor, logits: Tensor, done: Tensor) -> Tensor:
        """input_ids: (B, T) columns; logits: (B, V) float32; done: (B,). Returns edited logits (B, V)."""
        column = input_ids.shape[1]
        if self.processors or self.constraint.allowed is not None:
            self.constraint.asked = asked = rows_to_ask(self.plan, done, column)
        for group in self.groups:
            if column >= group.begin:
                logits = self._by_options(group, input_ids, logits)
        if self.processors:
            for rows, source, ids, length in own_texts(self.plan, asked, input_ids):
                scores = logits if source is None else logits[source]
                if self.keeps_raw and source is None:
                    scores = scores.clone()  # transformers hands out this very tensor; a processor may write to it
                for processor in self.of_length[length]:
                    scores = _check_scores(processor, processor(ids, scores), scores)
                logits = _placed(logits, rows, scores[rows])
        return logits

    def _by_options(self, group: _Group, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Edit a group's logits by the options."""
        ids = input_ids[:, group.begin - group.length :]
        everyone = len(group.rows) == len(logits)
        ids, scores = (ids, logits) if everyone else (ids[group.rows], logits[group.rows])
        for processor in group.processors:
            scores = processor(ids, scores)
        return scores.float() if everyone else _placed(logits, group.rows, scores)


class CallersCriteria:
    """The caller's stopping criteria, stop strings among them."""

    def __init__(self, plan: Plan, call: Call) -> None:
        self.plan = plan
        listed = list(call.to_loop.get("stopping_criteria") or [])
        if call.options.get("stop_strings"):
            if call.to_loop.get("tokenizer") is None:
                raise ValueError("stop_strings are text, so generate needs the model's tokenizer: pass tokenizer=")
            listed.append(_stop_string_criteria(call.to_loop["tokenizer"], call.options["stop_strings"]))
        self.criteria = listed
        self.of_length = for_each_length(listed, plan)

    def __bool__(self) -> bool:
        return bool(self.criteria)

    def __call__(self, input_ids: Tensor, running: Tensor, logits: Tensor | None, **kwargs: Any) -> Tensor:
        """Ask about some rows. transformers hands a tuple of all steps' scores, or None; here it holds the last step's.

        input_ids: (B, T) columns; running: (B,) rows to ask about; logits: (B, V). Returns (B,): rows that are met.
        """
        met = torch.zeros_like(running)
        for rows, source, ids, length in own_texts(self.plan, running.nonzero()[:, 0].tolist(), input_ids):
            scores = None if logits is None else (logits if source is None else logits[source],)
            for criterion in self.of_length[length]:
                met[rows] |= _check_met(criterion, criterion(ids, scores, **kwargs), met)[rows]
        return met


def _stop_string_criteria(tokenizer: Any, strings: list[str]) -> StopStringCriteria:
    """Make transformers' criterion, which matches stop strings token by token."""
    try:
        return StopStringCriteria(tokenizer, strings)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"stop_strings are matched by what each token spells, and transformers cannot tell that of "
            f"{type(tokenizer).__name__}'s ({error}): take stream(stop=), which decodes the text"
        ) from error


def rows_to_ask(plan: Plan, done: Tensor, column: int) -> list[int]:
    """List the rows whose token in this column is drawn and kept: not forced, not done, not beyond their limit."""
    asked = ~done & (plan.begins <= column) & (column < plan.ends)
    return asked.nonzero()[:, 0].tolist()


def for_each_length(functions: list[Any], plan: Plan) -> dict[int, list[Any]]:
    """Return functions to call for the rows of each prompt length: the given ones for the first row's, else copies.

    Many remember the length of the prompts, or count their calls. A shallow copy does so for its own rows.
    """
    own = plan.lengths[0]
    return {length: functions if length == own else list(map(copied, functions)) for length in plan.lengths}


def for_each_part(call: Call, parts: int) -> list[Call]:
    """Return the call for each part of a batch that runs apart: as given for the first, else with copied functions."""
    names = ("logits_processor", "stopping_criteria")
    given = {name: call.to_loop[name] for name in names if call.to_loop.get(name)}
    copies = [{name: list(map(copied, functions)) for name, functions in given.items()} for _ in range(1, parts)]
    return [call, *(replace(call, to_loop={**call.to_loop, **own}) for own in copies)]


def copied(function: Any) -> Any:
    """Copy a processor or criterion with its dicts, its other attributes shared; a function cannot be copied."""
    try:
        twin = copy.copy(function)
        if twin is not function:
            vars(twin).update({name: copy.copy(one) for name, one in vars(twin).items() if isinstance(one, dict)})
    except Exception:  # its class decides
        return function
    return twin


def own_texts(
    plan: Plan, asked: Sequence[int], input_ids: Tensor
) -> Iterator[tuple[Tensor, Tensor | None, Tensor, int]]:
    """Yield the texts of the rows in `asked`, rows whose prompts have one length at a time.

    Processors and criteria may identify rows by their index in the batch, so each is called with a whole batch, in
    which every row in `asked` keeps its index. The other places repeat one of these rows.

    Args:
        plan: where each row starts.
        asked: indices of the rows.
        input_ids: (B, T) columns.

    Yields:
        the indices of N rows (N,), the row that each place shows (B,) (None if every place shows its own), and the
        texts (B, own length), and the prompts' length.
    """
    by_length: dict[int, list[int]] = {}
    for row in asked:
        by_length.setdefault(plan.lengths[row], []).append(row)
    everyone = range(len(plan.prompts))
    for length, rows in by_length.items():
        offset = plan.offsets[rows[0]]
        places = torch.tensor(rows, device=input_ids.device)
        if len(rows) == len(plan.prompts):
            yield places, None, input_ids[:, offset:].clone(), length  # callers may write to what they get
            continue
        shown = set(rows)
        source = torch.tensor([row if row in shown else rows[0] for row in everyone], device=input_ids.device)
        yield places, source, input_ids[source, offset:], length


class _Constraint(LogitsProcessor):
    """`prefix_allowed_tokens_fn`: masks tokens that it does not allow, in the rows of `asked` only."""

    def __init__(self, plan: Plan, allowed: AllowedTokens | None) -> None:
        self.plan, self.allowed = plan, allowed
        self.asked: list[int] = []  # rows to constrain in this step

    def of_rows(self, rows: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """Make a processor that constrains some rows of the batch."""

        def constrain(input_ids: Tensor, scores: Tensor) -> Tensor:
            """input_ids: (G, T); scores: (G, V)."""
            assert self.allowed is not None
            wanted = set(self.asked)
            closed = torch.zeros_like(scores, dtype=torch.bool)
            for place, row in enumerate(rows):
                if row not in wanted:
                    continue
                where = f" for position {input_ids.shape[1]} of row {self.plan.row_ids[row]}"
                answer = self.allowed(self.plan.row_ids[row], input_ids[place].clone())
                tokens = check_allowed(answer, self.plan.scored_size, where)
                if not tokens:
                    raise ValueError(
                        f"prefix_allowed_tokens_fn must allow at least one token, but allows none{where}: return the "
                        "EOS id to end a row"
                    )
                closed[place] = True
                closed[place, torch.tensor(tokens, device=scores.device)] = False
            return scores.masked_fill(closed, -torch.inf)

        return constrain


def _groups(model: Any, plan: Plan, call: Call, constraint: _Constraint) -> Iterator[_Group]:
    """Group rows that can share processors: equal prompt lengths, and equal limits if an EOS is forced."""
    forces_eos = call.options.get("forced_eos_token_id") is not None
    members: dict[tuple[int, int], list[int]] = {}
    for row, (length, limit) in enumerate(zip(plan.lengths, plan.limits, strict=True)):
        members.setdefault((length, limit if forces_eos else 0), []).append(row)
    for (length, limit), rows in members.items():
        prompts = torch.tensor([plan.prompts[row] for row in rows], device=plan.device)
        constrain = constraint.of_rows(rows) if constraint.allowed is not None else None
        processors = option_processors(model, call.options, plan, prompts, length + limit, constrain)
        begin = plan.offsets[rows[0]] + length
        yield _Group(torch.tensor(rows, device=plan.device), length, begin, processors)


def option_processors(
    model: Any,
    options: dict[str, Any],
    plan: Plan,
    prompts: Tensor,
    max_length: int,
    constrain: Callable[[Tensor, Tensor], Tensor] | None,
) -> list[Any]:
    """Make transformers' processors for the options in force, in transformers' order, for rows of one length.

    Args:
        model: used by classifier-free guidance, which forwards it once more.
        options: the call's options.
        plan: the EOS ids, and the device.
        prompts: (G, T) ids.
        max_length: most tokens of these rows, prompt included; used if an EOS is forced.
        constrain: the constraint of `prefix_allowed_tokens_fn`, if there is one.
    """
    length, device, eos = prompts.shape[1], str(plan.device), list(plan.eos_ids)
    given = {name: options[name] for name in Call(options=options).editing() if eos or name not in NEEDING_EOS}
    if constrain is not None:
        given["prefix_allowed_tokens_fn"] = constrain
    if "bad_words_ids" in given:  # as in transformers, EOS alone is no bad word
        given["bad_words_ids"] = [words for words in given["bad_words_ids"] if list(words) not in [[e] for e in eos]]
        given = {name: value for name, value in given.items() if name != "bad_words_ids" or value}
    # As in transformers: if a token is forced after a prompt of BOS alone, suppression begins after that token.
    begin = length + 1 if length == 1 and "forced_bos_token_id" in given else length
    caching = options.get("use_cache") is not False
    make: dict[str, Callable[[Any], Any]] = {
        "guidance_scale": lambda scale: hf.UnbatchedClassifierFreeGuidanceLogitsProcessor(
            scale, model, use_cache=caching
        ),
        "sequence_bias": lambda bias: hf.SequenceBiasLogitsProcessor(bias),
        "encoder_repetition_penalty": lambda penalty: hf.EncoderRepetitionPenaltyLogitsProcessor(penalty, prompts),
        "repetition_penalty": lambda penalty: hf.RepetitionPenaltyLogitsProcessor(penalty),
        "no_repeat_ngram_size": lambda size: hf.NoRepeatNGramLogitsProcessor(size),
        "encoder_no_repeat_ngram_size": lambda size: hf.EncoderNoRepeatNGramLogitsProcessor(size, prompts),
        "bad_words_ids": lambda words: hf.NoBadWordsLogitsProcessor(words, eos),
        "min_length": lambda least: hf.MinLengthLogitsProcessor(least, eos, device=device),
        "min_new_tokens": lambda least: hf.MinNewTokensLengthLogitsProcessor(length, least, eos, device=device),
        "prefix_allowed_tokens_fn": lambda constraint: constraint,
        "forced_bos_token_id": lambda token: hf.ForcedBOSTokenLogitsProcessor(token),
        "forced_eos_token_id": lambda token: hf.ForcedEOSTokenLogitsProcessor(max_length, token, device=device),
        "remove_invalid_values": lambda _: hf.InfNanRemoveLogitsProcessor(),
        "exponential_decay_length_penalty": lambda penalty: hf.ExponentialDecayLengthPenalty(penalty, eos, length),
        "suppress_tokens": lambda tokens: hf.SuppressTokensLogitsProcessor(tokens, device=device),
        "begin_suppress_tokens": lambda tokens: hf.SuppressTokensAtBeginLogitsProcessor(tokens, begin, device=device),
    }
    return [make[name](given[name]) for name in make if name in given]


def _check_scores(processor: Any, found: Any, given: Tensor) -> Tensor:
    """Check the scores (B, V) that a caller's processor returns."""
    if isinstance(found, Tensor) and found.shape == given.shape:
        return found
    got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise TypeError(
        f"a logits processor must return scores of the shape that it gets, {tuple(given.shape)}, got {got} from "
        f"{_name_of(processor)}"
    )


def _check_met(criterion: Any, found: Any, met: Tensor) -> Tensor:
    """Check the answer of a caller's criterion; return (B,) bool. True or False means all rows or none."""
    found = torch.as_tensor(found, device=met.device) if isinstance(found, (bool, Tensor)) else found
    if isinstance(found, Tensor) and found.shape in ((), met.shape):
        return found.bool().expand_as(met)
    got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise TypeError(
        f"a stopping criterion must return True, False or one of them per row, {tuple(met.shape)}, got {got} from "
        f"{_name_of(criterion)}"
    )


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


def _as_new(processor: Any) -> Any:
    """Copy a processor whose state would go on in the caller's next call; others are returned."""
    return copied(processor) if type(processor).__name__ in _STATEFUL else processor


def _refuse_stateful(processors: Sequence[Any]) -> None:
    """Refuse processors with a state for the whole batch if prompts differ in length."""
    for processor in processors:
        if type(processor).__name__ in _STATEFUL:
            raise ValueError(
                f"{type(processor).__name__} keeps a state for a whole batch, and rows of a ragged one begin at "
                "different times: pass prompts of one length, or one prompt at a time"
            )


def _placed(logits: Tensor, rows: Tensor, scores: Tensor) -> Tensor:
    """Replace the logits (B, V) of some rows (N,) by scores (N, V)."""
    return logits.index_copy(0, rows, scores.to(logits.dtype))
