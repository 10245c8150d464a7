"""Make events of a run, a token at a time: each row's new token with its text and scores, and how the row ended.

The loop calls `EventSource` after each step. What this module does not do: it decodes nothing itself (it is given
decoders), and it runs nothing (see `streaming`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..defaults import SAMPLING_LOGPROBS
from ..text.growing import GrowingText
from ..text.stopping import Stop, StopStrings, TextOf
from ..text.tokens import INCOMPLETE
from .plan import Plan
from .scoring import NamedLogprobs, TokenScores, TopLogprobs

_Draw = Sequence[float]  # a token's logprobs after temperature and after the nucleus, and the nucleus' mass
_NOT_DRAWN = (0.0, 0.0, 1.0)


class TokenEvent(NamedTuple):
    """A token of a row, or, with a `finish_reason`, the row's end.

    A row's texts add up to what is decoded; bytes that make no character yet, and what may become a stop string, are
    held back, so a token's text may be empty.
    """

    row: int
    id: int | None  # None at the row's end
    text: str
    logprob: float | None = None  # raw, if asked for
    top: TopLogprobs | None = None  # the best ids with their raw logprobs, if asked for
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | None = None  # the stop string that ended the row
    logprobs_of: NamedLogprobs | None = None  # the named ids with their raw logprobs and ranks, if asked for
    temperature_logprob: float | None = None  # after temperature, over the whole vocabulary; with `sampling_logprobs`
    sampled_logprob: float | None = None  # after temperature and nucleus; with `sampling_logprobs`
    nucleus_mass: float | None = None  # of the nucleus that the token was drawn from; with `sampling_logprobs`


@dataclass(frozen=True)
class Decoders:
    """Decoders of a run's texts.

    Args:
        prompt: decodes an echoed prompt.
        after: takes a prompt, returns the decoder of its completion.
        is_byte: see `GrowingText`.
        control_tokens: see `StopStrings`.
    """

    prompt: TextOf
    after: Callable[[Sequence[int]], TextOf]
    is_byte: Callable[[int], bool] | None = None
    control_tokens: Mapping[str, int] = field(default_factory=dict)


class _Scores(NamedTuple):
    """A token's scores, under the names of an event's fields; None for those not asked for."""

    logprob: float | None = None
    top: TopLogprobs | None = None
    logprobs_of: NamedLogprobs | None = None
    temperature_logprob: float | None = None
    sampled_logprob: float | None = None
    nucleus_mass: float | None = None


class _Row:
    """One row's answer so far."""

    def __init__(self, number: int, plan: Plan, decoders: Decoders, stops: StopStrings) -> None:
        prompt = plan.prompts[number]
        self.number = number
        self.echoed = len(prompt) if plan.echo else 0
        self.count = 0  # tokens of the answer so far
        self.finished = False
        self.prompt = GrowingText[tuple[int, _Scores]](decoders.prompt, is_byte=decoders.is_byte)
        self.text = GrowingText[tuple[int, _Scores]](decoders.after(prompt), stops, number, decoders.is_byte)
        self.left = ""  # rest of the prompt's text, for the next event
        # With `compat="meta"` an echoed prompt is cut at an EOS.
        cut = (at for at, token in enumerate(prompt) if token in plan.eos_ids)
        self.most = next(cut, None) if plan.echo and plan.compat == "meta" else None

    def take(self, token: int, scores: _Scores) -> list[TokenEvent]:
        """Add the answer's next token; return its events."""
        self.count += 1
        if self.most is not None and self.count > self.most:
            return []
        in_prompt = self.count <= self.echoed
        released = (self.prompt if in_prompt else self.text).add(token, (token, scores))
        events = [self._event(token, scores, text) for (token, scores), text in released]
        if in_prompt and self.count == self.echoed:
            self.left += self.prompt.end()[1].text.rstrip(INCOMPLETE)
        return events

    def finish(self, reason: str) -> list[TokenEvent]:
        """End the row; return its last events."""
        self.finished = True
        if self.echoed and self.count < self.echoed:  # cut within its prompt
            self.left += self.prompt.end()[1].text
        released, end = self.text.end()
        events = [self._event(token, scores, text) for (token, scores), text in released]
        text, self.left = self.left + end.text, ""
        ended_by = "stop" if end.stop is not None else reason
        return [*events, TokenEvent(self.number, None, text, None, None, ended_by, end.stop)]

    def _event(self, token: int, scores: _Scores, text: str) -> TokenEvent:
        text, self.left = self.left + text, ""
        return TokenEvent(self.number, token, text, **scores._asdict())


class EventSource:
    """Makes events of the loop's steps, and ends rows at their stop strings.

    Args:
        decoders: decode the texts.
        stop: the stop strings.
        emit: takes the events of each step.
    """

    def __init__(self, decoders: Decoders, stop: Stop | None, emit: Callable[[list[TokenEvent]], object]) -> None:
        self.decoders, self.stop, self.emit = decoders, stop, emit
        self.rows: list[_Row] = []

    def take_plan(self, plan: Plan) -> None:
        """Prepare for the rows of the whole call."""
        self.whole, self.has_named = plan, any(plan.named)
        stop = [] if self.stop is None else self.stop
        self.stops = StopStrings(stop, len(plan.prompts), self.decoders.control_tokens)
        self.rows = [_Row(number, plan, self.decoders, self.stops) for number in range(len(plan.prompts))]

    def begin(self, plan: Plan, state: Any, scorer: Any, prompt_rows: Any) -> None:
        """Begin a run of some of the rows; see `loop.run_loop`."""
        self.plan, self.state, self.scorer, self.prompt_rows = plan, state, scorer, prompt_rows
        self.eos_ids = set(plan.eos_ids)
        self.begun = False

    def step(self, input_ids: Tensor) -> list[bool]:
        """Emit the events of a step; return which rows of the run met a stop string. input_ids: (B, T)."""
        events: list[TokenEvent] = []
        if not self.begun and self.plan.echo:
            events += self._prompts()
        self.begun = True
        column, tokens = input_ids.shape[1] - 1, input_ids[:, -1].tolist()
        scores = self._scores(self.state.scores[-1], 0, self._draws()) if self.plan.wants_scores else None
        by_criterion = (self.state.criterion_stops == column + 1).tolist()
        met = []
        for place, token in enumerate(tokens):
            row = self.rows[self.plan.row_ids[place]]
            found = _Scores() if scores is None else scores[place]
            made, stopped = self._take(row, place, column, token, found, by_criterion=by_criterion[place])
            events += made
            met.append(stopped)
        self.emit(events)
        return met

    def finish(self, output: Any) -> None:
        """Emit the remaining events of rows that no step has finished, from the call's output."""
        events: list[TokenEvent] = []
        for row in self.rows:
            if row.finished:
                continue
            lists = [getattr(output, name) for name in ("logprobs", "top_logprobs", "logprobs_of", *SAMPLING_LOGPROBS)]
            for place in range(row.count, len(output.tokens[row.number])):
                logprob, top, named, *draw = [found and found[row.number][place] for found in lists]
                events += row.take(output.tokens[row.number][place], self._asked_for(logprob, top, named, draw))
            events += row.finish(output.finish_reason[row.number])
        self.emit(events)

    def _take(
        self, row: _Row, place: int, column: int, token: int, scores: _Scores, *, by_criterion: bool
    ) -> tuple[list[TokenEvent], bool]:
        """Make the events of one row's token in a column; return also whether it met a stop string."""
        plan = self.plan
        position, length = column - plan.offsets[place], plan.lengths[place]
        if row.finished or position >= length + plan.limits[place]:
            return [], False
        if position < length:  # the row is still being forced
            return (row.take(token, scores) if plan.echo else []), False
        if token in self.eos_ids:
            return row.finish("stop"), False
        events = row.take(token, scores)
        if self.stops.settled(row.number, row.text.text):
            return events + row.finish("stop"), True
        if by_criterion:
            return events + row.finish("stop"), False
        if position + 1 == length + plan.limits[place]:
            return events + row.finish("length"), False
        return events, False

    def _prompts(self) -> list[TokenEvent]:
        """Make the events of the prefilled part of the prompts."""
        plan, events = self.plan, []
        columns = None if self.scorer is None else self.scorer.scores(plan.offsets)
        given = [] if columns is None else [self._scores(columns, at) for at in range(plan.start - 1)]
        for place, prompt in enumerate(plan.prompts):
            for position in range(min(len(prompt), plan.start - plan.offsets[place])):
                scores = self._of_prompt(given, place, position)
                events += self.rows[plan.row_ids[place]].take(prompt[position], scores)
        return events

    def _of_prompt(self, given: list[list[_Scores]], place: int, position: int) -> _Scores:
        """Look up the scores of a prompt's token; the first one has no context, so 0.0."""
        plan = self.plan
        if self.prompt_rows is not None:
            row = self.prompt_rows[place]
            return self._asked_for(row.logprobs[position], row.top_logprobs[position], row.named[position])
        if position == 0 or not plan.wants_scores:
            return self._asked_for(0.0, [], [])
        return given[plan.offsets[place] + position - 1][place]

    def _scores(self, columns: TokenScores, at: int, draws: Sequence[_Draw] | None = None) -> list[_Scores]:
        """Return each row's scores in one column; None for scores not asked for."""
        logprobs, *others = [values[:, at].tolist() for values in columns]
        tops, named = others[:2], others[2:]
        return [
            self._asked_for(
                logprobs[place],
                list(zip(*(column[place] for column in tops), strict=True)),
                # `strict=False` drops the padding of shorter lists.
                list(zip(self.plan.named[place], *(column[place] for column in named), strict=False)),
                _NOT_DRAWN if draws is None else draws[place],
            )
            for place in range(len(logprobs))
        ]

    def _draws(self) -> list[_Draw]:
        """Return what each row's last token was drawn with."""
        probs, masses = self.state.softmax_probs[-1], self.state.nucleus_masses[-1]  # (B,)
        columns = [values.tolist() for values in (probs.log(), (probs / masses).log(), masses)]
        return list(zip(*columns, strict=True))

    def _asked_for(self, logprob: float, top: TopLogprobs, named: NamedLogprobs, draw: _Draw = _NOT_DRAWN) -> _Scores:
        """Keep the scores that the call asks for."""
        plan = self.whole
        return _Scores(
            logprob if plan.logprobs or plan.sampling_logprobs else None,
            top if plan.top_logprobs else None,
            named if self.has_named else None,
            *(draw if plan.sampling_logprobs else ()),
        )
