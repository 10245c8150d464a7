"""Everything about one call that never changes while it runs, checked against the model, as one frozen value.

What this module does not do: it forwards nothing and keeps no state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..checks import PerRow, check_bool, check_choice, check_generator, check_int, first_not_none
from ..sampling.settings import SamplingSettings, repeat_interleave
from .inputs import check_lengths, check_named_ids, left_padded
from .model_info import (
    check_max_seq_len,
    check_positions,
    context_of,
    device_of,
    eos_ids_of,
    length_limit,
    pad_id_of,
    scored_size_of,
    token_broadcast,
)
from .options import Call, choose_gen_lens, choose_temperature, choose_top_p, resolve_alias
from .schedule import Layout, Schedule, choose_schedule
from .scoring import Asked
from .trimming import Compat

Apart = Literal["none", "lengths", "rows"]
_PER_ROW = ("prompts", "row_ids", "copies", "gen_lens", "limits", "named")  # the fields of a plan with a value per row


class Probes(Protocol):
    """Tells what a model's forward can take; see `probe`."""

    def takes_padding(self) -> bool:
        """Whether masked padding before a row leaves its logits unchanged."""

    def keeps_rows_apart(self) -> bool:
        """Whether the other rows of a batch of one length leave a row's logits unchanged."""

    def scores_prompts(self) -> bool:
        """Whether the logits at t depend on tokens 0..t alone (causal)."""

    def reads_by_steps(self, width: int) -> bool:
        """Whether a text of `width` tokens may be forwarded token by token with the same logits."""


@dataclass(frozen=True)
class Request:
    """The arguments that `generate` spells out, as the call gave them; its docstring says what each means."""

    max_gen_len: Any
    max_seq_len: int | None
    temperature: PerRow | None
    top_p: PerRow | None
    seeds: int | Sequence[int] | None
    generator: torch.Generator | None
    echo: bool
    logprobs: bool
    top_logprobs: int
    logprobs_of: Any
    sampling_logprobs: bool
    schedule: Schedule
    compat: Compat
    chunk_bytes: int
    share_prefix: bool | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Describes one call. A row is a prompt, or one of the copies that `num_return_sequences` makes of it.

    A column is an index into the loop's tensor of ids (B, T): row `r` holds its token `t` in column `offsets[r] + t`.
    """

    prompts: list[list[int]]  # token ids of each row
    row_ids: list[int]  # each row's index in the whole call
    copies: list[int]  # which copy of its prompt a row is, from 0
    num_return_sequences: int  # copies of each prompt
    gen_lens: list[int]  # most new tokens of each row, as asked
    limits: list[int]  # the same, cut to what `max_seq_len` leaves
    max_seq_len: int | None  # most tokens of a row, prompt included; None: no limit
    schedule: Layout  # "reference" or "padded"
    apart: Apart  # how to split the batch into runs: not at all, by prompt length, or by row
    sampling: SamplingSettings  # temperature, top_p, seeds (one per row) and generator
    eos_ids: tuple[int, ...]  # ids that end a row when generated
    pad_id: int  # fills the answer's `sequences`
    fill_id: int  # fed to the model for rows that are done; unlike `pad_id` it can always be embedded
    echo: bool  # whether the answer starts with the prompt
    logprobs: bool  # whether to return raw logprobs
    top_logprobs: int  # best tokens per position
    named: list[list[int]]  # for each row the ids whose logprobs and ranks are to be returned
    sampling_logprobs: bool  # whether to return the logprobs that each token was drawn with
    compat: Compat  # "meta" keeps the reference's quirks
    chunk_bytes: int  # memory for the logits of one chunk of prompt
    share_prefix: bool | None  # whether to prefill common prefixes and equal rows once; None: if it saves enough
    scored_size: int  # ids that the logits have a place for
    device: torch.device  # of token ids
    broadcast_tokens: Callable[[Tensor], Tensor] | None  # makes the ranks of a parallel model take the same tokens (B,)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return [len(prompt) for prompt in self.prompts]

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest prompt."""
        return min(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.lengths)

    @property
    def padded(self) -> bool:
        """Whether prompts are left-padded, so that all of them end in one column."""
        return self.schedule == "padded"

    @property
    def ragged(self) -> bool:
        """Whether prompts differ in length."""
        return self.shortest < self.longest

    @property
    def wants_scores(self) -> bool:
        """Whether any logprob is to be returned."""
        return bool(self.logprobs or self.top_logprobs or any(self.named) or self.sampling_logprobs)

    @cached_property
    def asked(self) -> Asked:
        """Scores to return at each position, beside the logprob of its token."""
        return Asked(self.top_logprobs, self.named, self.device)

    @property
    def scores_unshifted(self) -> bool:
        """Whether to keep the reference's quirk: unshifted scores of equally long prompts with nothing to generate."""
        nothing_to_generate = self.shortest == self.total_len
        return self.compat == "meta" and self.echo and self.wants_scores and nothing_to_generate

    @cached_property
    def total_len(self) -> int:
        """Most tokens of any row, prompt included."""
        return max(length + limit for length, limit in zip(self.lengths, self.limits, strict=True))

    @cached_property
    def start(self) -> int:
        """First column that the loop fills; columns before it are prefilled."""
        return self.longest if self.padded else self.shortest

    @cached_property
    def steps(self) -> int:
        """Most columns that the loop fills."""
        return max(self.limits) if self.padded else self.total_len - self.shortest

    @cached_property
    def offsets(self) -> list[int]:
        """The column in which each row starts."""
        return [self.longest - length if self.padded else 0 for length in self.lengths]

    @cached_property
    def begins(self) -> Tensor:
        """(B,): the column in which each row's completion begins."""
        begins = [offset + length for offset, length in zip(self.offsets, self.lengths, strict=True)]
        return torch.tensor(begins, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """(B,): the column after the last one that each row's limit allows."""
        return self.begins + torch.tensor(self.limits, device=self.device)

    @cached_property
    def eos(self) -> Tensor:
        """(number of ids,): `eos_ids` on the device."""
        return torch.tensor(self.eos_ids, dtype=torch.long, device=self.device)

    @property
    def limits_end_rows(self) -> bool:
        """Whether a row stops at its limit.

        False on Meta's stream in the reference schedule, which must consume as many random numbers as the reference:
        it draws for a row until its EOS, even beyond the row's limit.
        """
        return self.padded or _draws_by_row(self.sampling)

    def parts(self) -> list["Plan"]:
        """Split into plans by row or by prompt length, if `apart` says so."""
        if self.apart == "none" or len(self.prompts) == 1 or (self.apart == "lengths" and not self.ragged):
            return [self]
        parts: dict[int, list[int]] = {}
        for row, length in enumerate(self.lengths):
            parts.setdefault(row if self.apart == "rows" else length, []).append(row)
        return [self._of_rows(rows) for rows in parts.values()]

    def _of_rows(self, rows: list[int]) -> "Plan":
        """Select some rows."""

        def some(values: Any) -> Any:
            return [values[row] for row in rows] if isinstance(values, Sequence) else values

        lists = {name: some(getattr(self, name)) for name in _PER_ROW}
        given = self.sampling
        sampling = SamplingSettings(some(given.temperature), some(given.top_p), some(given.seeds), given.generator)
        return replace(self, sampling=sampling, **lists)

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor]:
        """The columns to prefill: ids and mask, (B, start) each."""
        if self.padded:
            ids, mask = left_padded(self.prompts)
        else:
            ids = torch.tensor([prompt[: self.start] for prompt in self.prompts])
            mask = torch.ones_like(ids)
        return ids.to(self.device), mask.to(self.device)

    @property
    def shown(self) -> Tensor:
        """(B, start): the ids of the layout as callers see them, `pad_id` in place of the padding."""
        ids, mask = self.layout
        return ids.masked_fill(mask == 0, self.pad_id)

    def forced(self) -> Tensor | None:
        """(B, longest): the prompts, -1 after each one's end; None if the loop forces no token."""
        if self.padded or not self.ragged:
            return None
        rows = [prompt + [-1] * (self.longest - len(prompt)) for prompt in self.prompts]
        return torch.tensor(rows, device=self.device)


def make_plan(model: Any, prompts: list[list[int]], call: Call, request: Request, probes: Probes) -> Plan:
    """Check a call against its model, and settle all that the loop needs to know.

    Args:
        model: a decoder-only causal language model.
        prompts: lists of ids.
        call: the sorted keywords.
        request: the arguments that `generate` spells out.
        probes: tell what the model's forward can take; each is tried out when first asked.

    Raises:
        ValueError, TypeError: a bad value, named with its rule, its row and the way out.
    """
    options, scored_size, device = call.options, scored_size_of(model), device_of(model)
    check_choice("schedule", request.schedule, ("auto", "reference", "padded"))
    check_choice("compat", request.compat, ("fixed", "meta"))
    echo = check_bool("echo", request.echo)
    logprobs = check_bool("logprobs", request.logprobs, _best_tokens_instead(request.logprobs))
    top_logprobs = check_int("top_logprobs", request.top_logprobs, least=0, most=scored_size)
    named = check_named_ids(request.logprobs_of, len(prompts), scored_size)
    sampling_logprobs = check_bool("sampling_logprobs", request.sampling_logprobs)
    chunk_bytes = check_int("chunk_bytes", request.chunk_bytes, least=1)
    copies = check_int("num_return_sequences", first_not_none(options.get("num_return_sequences"), 1), least=1)
    sampling = _sampling_settings(request, call, len(prompts), copies, device)
    max_seq_len, gen_lens, limits = _lengths(model, prompts, call, request)
    rows = repeat_interleave(prompts, copies)
    apart = _rows_apart(model, rows, repeat_interleave(limits, copies), sampling, probes)
    schedule: Layout = "padded" if request.schedule == "padded" else "reference"
    if apart == "none":
        schedule = _schedule_of_one_run(model, prompts, limits, max_seq_len, call, request, probes)
        apart = _apart_for_steps(schedule, prompts, sampling, probes)
    eos_ids = eos_ids_of(model, options)
    pad_id = pad_id_of(model, options, eos_ids)
    return Plan(
        prompts=rows,
        row_ids=list(range(len(rows))),
        copies=list(range(copies)) * len(prompts),
        num_return_sequences=copies,
        gen_lens=repeat_interleave(gen_lens, copies),
        limits=repeat_interleave(limits, copies),
        max_seq_len=max_seq_len,
        schedule=schedule,
        apart=apart,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        # Old checkpoints name a pad token that cannot be embedded, such as -1.
        fill_id=pad_id if 0 <= pad_id < scored_size else first_not_none(*eos_ids, 0),
        echo=echo,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        named=repeat_interleave(named, copies),
        sampling_logprobs=sampling_logprobs,
        compat=request.compat,
        chunk_bytes=chunk_bytes,
        share_prefix=_share_prefix(request),
        scored_size=scored_size,
        device=device,
        broadcast_tokens=token_broadcast(model),
    )


def _schedule_of_one_run(
    model: Any,
    prompts: list[list[int]],
    limits: list[int],
    max_seq_len: int | None,
    call: Call,
    request: Request,
    probes: Probes,
) -> Layout:
    """Choose the schedule of rows that run together."""
    return choose_schedule(
        request.schedule,
        [len(prompt) for prompt in prompts],
        limits,
        None if max_seq_len is None else max(max_seq_len, context_of(model) or 0),
        takes_padding=lambda: not positions_depend_on_length(model, prompts, limits) and probes.takes_padding(),
        timed=call.options.get("max_time") is not None,
    )


def _share_prefix(request: Request) -> bool | None:
    """Read `share_prefix`. Do not share by default under schedule="reference", which promises bit-for-bit equality."""
    if request.share_prefix is not None:
        return check_bool("share_prefix", request.share_prefix, "leave it out to share where it pays")
    return False if request.schedule == "reference" else None


def positions_depend_on_length(model: Any, prompts: list[list[int]], limits: list[int]) -> bool:
    """Whether some row may grow so long that the rotary factors of the whole batch change."""
    limit = length_limit(model)
    longest = max(len(prompt) + most for prompt, most in zip(prompts, limits, strict=True))
    return limit is not None and longest > limit


def _rows_apart(
    model: Any, prompts: list[list[int]], limits: list[int], sampling: SamplingSettings, probes: Probes
) -> Apart:
    """Choose which rows must run apart, since they would change each other's logits.

    On Meta's stream a batch cannot be split, since its draws belong to the batch. So accept there that the longest row
    changes the others (as in the reference), but refuse models that mix rows.
    """
    own_stream = _draws_by_row(sampling)
    if len(prompts) > 1 and not probes.keeps_rows_apart():
        if not own_stream:
            raise ValueError(
                f"{type(model).__name__} mixes the rows of a batch, and on Meta's stream rows run together: pass "
                "seeds, or one prompt at a time"
            )
        return "rows"
    ragged = len(set(map(len, prompts))) > 1
    if not (own_stream and ragged):
        return "none"
    # If attention is not causal, forwarding a prompt in parts changes its logits.
    longest_matters = positions_depend_on_length(model, prompts, limits) or not probes.scores_prompts()
    return "lengths" if longest_matters else "none"


def _apart_for_steps(schedule: Layout, prompts: list[list[int]], sampling: SamplingSettings, probes: Probes) -> Apart:
    """Split by prompt length if the reference schedule would force tokens that the model cannot take one by one."""
    lengths = [len(prompt) for prompt in prompts]
    forced = schedule == "reference" and min(lengths) < max(lengths)
    return "lengths" if forced and _draws_by_row(sampling) and not probes.reads_by_steps(max(lengths)) else "none"


def _draws_by_row(sampling: SamplingSettings) -> bool:
    """Whether a row's draws are independent of its batch: by seeds or greedy, not on Meta's stream."""
    return sampling.seeds is not None or sampling.temperature == 0


def _sampling_settings(
    request: Request, call: Call, prompts: int, copies: int, device: torch.device
) -> SamplingSettings:
    """Read temperature and top_p (one for all rows or one per row), seeds (one per row) and the generator."""
    given = SamplingSettings(
        choose_temperature(request.temperature, call),
        choose_top_p(request.top_p, call),
        request.seeds,
        request.generator,
    )
    check_generator(given.generator, device)
    return given.for_rows(prompts, copies)


def _best_tokens_instead(logprobs: Any) -> str:
    """The way out of `logprobs=5`, which asks for the best tokens in other libraries."""
    count = logprobs if isinstance(logprobs, int) and logprobs > 0 else "k"
    return f"for the best tokens at each position give top_logprobs={count}"


def _lengths(
    model: Any, prompts: list[list[int]], call: Call, request: Request
) -> tuple[int | None, list[int], list[int]]:
    """Read the limits: `max_seq_len`, and per prompt the most new tokens, as asked and as `max_seq_len` leaves them."""
    by_length, by_gen_len = request.max_seq_len, request.max_gen_len
    total = resolve_alias("max_seq_len", by_length, "max_length", call.option("max_length", beside=by_length))
    max_seq_len = check_max_seq_len(model, total)
    check_lengths(prompts, max_seq_len)
    asked = call.option("max_new_tokens", beside=by_gen_len)
    wanted = resolve_alias("max_gen_len", by_gen_len, "max_new_tokens", asked)
    gen_lens = choose_gen_lens(wanted, None if total is None else max_seq_len, prompts)
    limits = [
        gen_len if max_seq_len is None else min(gen_len, max_seq_len - len(prompt))
        for gen_len, prompt in zip(gen_lens, prompts, strict=True)
    ]
    check_positions(model, max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    return max_seq_len, gen_lens, limits
