"""Prefill once the tokens that rows share (a common prefix, equal rows); reuse those that an earlier call prefilled.

Three rows in the padded schedule, the first two equal; all begin with `a b c`::

    . . a b c d      1. one row        a b              the common prefix without its last token
    . . a b c d      2. unique rows    . . a b c | d    from the cache of step 1, laid out as in the batch,
    a b c e f g                        a b c e f | g    up to the last column
                     3. the loop       all rows, from the caches of step 2: the last column, then new tokens

If an earlier call has prefilled a prefix of every row (see `prompt_cache`), its keys and values replace step 1. The
layout of the batch is the same with and without sharing, and so are masks, positions and windows. What this module does
not do: it generates nothing; transformers' loop continues from the cache that it returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from .caches import join_rows, lay_out, select_rows
from .options import CACHING, Call
from .plan import Plan
from .probe import Probe
from .prompt_cache import Beginning, ReadTexts, still_reads_alike, worth_taking
from .releases import CACHE_NAME, cache_in
from .scoring import PromptScorer, TokenScores, chunk_of
from .walk import forward_cost

# Share by default only if that saves the cost of so many forwards: a model's first call also has to probe its caches.
_WORTH = 4


@dataclass(frozen=True)
class SharedPrefill:
    """The cache and the scores of a batch's first columns."""

    columns: int
    cache: Any  # of these columns, B rows
    scores: TokenScores | None  # of the token after each column, (B, columns), if asked for
    bad: Tensor | None  # (B, columns) whether a column's logits hold nan or inf


def share_prefill(
    model: Any, generate: Callable[..., Any], plan: Plan, call: Call, *, scored: bool, texts: ReadTexts | None = None
) -> SharedPrefill | None:
    """Prefill the tokens that rows share; return None if that saves too little or the model's caches do not allow it.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model, which takes an `observer`.
        plan: the rows' layout, and whether sharing was asked for.
        call: the keywords that go to the loop and to the model.
        scored: whether the columns' scores are wanted.
        texts: prefilled texts of earlier calls; they are taken out.
    """
    known = [] if texts is None else texts.take(plan.prompts)
    if not leaves_cache(call):
        return None
    ids, mask = plan.layout
    first_rows, index = _unique_rows(ids, mask, plan.asked.named if scored else None)
    stage = _Stages(model, generate, plan, scored)
    shared = None
    if known and not scored:  # cached tokens are not forwarded, so they have no scores
        shared = stage.known_beginnings(first_rows, [known[row] for row in first_rows])
    del known
    if plan.share_prefix is not False:
        shared = _share(stage, ids, mask, first_rows, len(index) - len(first_rows), shared)
    return None if shared is None else stage.all_rows(shared, torch.tensor(index, device=plan.device))


def _share(
    stage: "_Stages", ids: Tensor, mask: Tensor, first_rows: list[int], copies: int, known: SharedPrefill | None
) -> SharedPrefill | None:
    """Prefill the common prefix and the unique rows of a batch (B, T), each only if it saves enough beyond `known`."""
    plan, probe = stage.plan, stage.probe
    least = 1 if plan.share_prefix else _WORTH * forward_cost(plan.device)
    read, last = 0 if known is None else known.columns, plan.start - 1
    common = _common_columns(plan, first_rows)
    prefix = common if common > read and common * (len(first_rows) - 1) >= least else 0
    if stage.scored and not plan.asked.same_for_all:
        prefix = 0  # the prefix is scored in one row, so all rows must ask for the same ids
    if prefix and not (
        probe.reads_in_chunks(plan.start) and (min(plan.offsets) == max(plan.offsets) or probe.moves_behind_padding())
    ):
        prefix = 0
    repeats = copies * (last - max(prefix, read)) >= least
    if repeats and not (probe.reads_in_chunks(plan.start) or probe.repeats_rows(plan.start)):
        repeats = False
    shared = stage.common_beginning(first_rows, prefix) if prefix else known
    if repeats:
        shared = stage.unique_rows(first_rows, ids[:, :last], mask[:, :last], ids[:, 1:], shared)
    return shared


def leaves_cache(call: Call) -> bool:
    """Whether a call leaves the cache and the prefill to us: no inputs, options or processes that depend on either."""
    asked = call.options
    return not (
        call.to_model
        or call.in_step  # what is shared differs between processes, and so would the number of forwards
        or any(asked.get(name) for name in CACHING)
        or asked.get("use_cache") is False
        or asked.get("output_attentions")
        or asked.get("output_hidden_states")
        or asked.get("max_time") is not None
    )


def _unique_rows(ids: Tensor, mask: Tensor, named: list[list[int]] | None = None) -> tuple[list[int], list[int]]:
    """Find the unique rows, and for each row the index of its unique row. ids, mask: (B, T); named: B lists.

    >>> _unique_rows(torch.tensor([[1, 5], [1, 6], [1, 5]]), torch.ones(3, 2))
    ([0, 1], [0, 1, 0])
    """
    seen: dict[tuple[Any, ...], int] = {}
    first_rows: list[int] = []
    index: list[int] = []
    columns = (ids.tolist(), mask.tolist(), named or [[]] * len(ids))
    for row, key in enumerate(zip(*(map(tuple, column) for column in columns), strict=True)):
        if key not in seen:
            seen[key] = len(first_rows)
            first_rows.append(row)
        index.append(seen[key])
    return first_rows, index


def _common_columns(plan: Plan, rows: Sequence[int]) -> int:
    """Count the prefilled tokens that all these rows begin with, less one: the last is left to forward."""
    first, *others = (plan.prompts[row] for row in rows)
    common = min(map(len, (first, *others)))
    for prompt in others:
        common = next((at for at in range(common) if prompt[at] != first[at]), common)
    return min(common, plan.start) - 1


class _Stages:
    """Steps of a shared prefill. Each runs transformers' own loop, and discards the one token that it must make."""

    def __init__(self, model: Any, generate: Callable[..., Any], plan: Plan, scored: bool) -> None:
        self.model, self.generate, self.plan, self.scored = model, generate, plan, scored
        self.probe = Probe(model, generate)

    def known_beginnings(self, rows: Sequence[int], known: Sequence[Beginning]) -> SharedPrefill | None:
        """Take the columns that earlier calls have prefilled in every row; None if they save too little."""
        plan, offsets = self.plan, [self.plan.offsets[row] for row in rows]
        ends = [
            offset + min(found.length, len(plan.prompts[row]) - 1)
            for offset, row, found in zip(offsets, rows, known, strict=True)
        ]
        columns = min(*ends, plan.start - 1)
        if not (
            worth_taking(columns, len(rows))
            and self.probe.reads_in_chunks(plan.start)
            and (max(offsets) == 0 or self.probe.moves_behind_padding())
            and still_reads_alike(self.model, self.generate, known[0].text)
        ):
            return None
        config = self.model.config.get_text_config(decoder=True)
        cache = join_rows([found.text.states for found in known], offsets, columns, config)
        return SharedPrefill(columns, cache, None, None)

    def common_beginning(self, rows: Sequence[int], columns: int) -> SharedPrefill:
        """Prefill the common prefix in one row, and lay it out behind each row's padding."""
        prompt = self.plan.prompts[rows[0]]
        ids = torch.tensor([prompt[:columns]], device=self.plan.device)
        targets = torch.tensor([prompt[1 : columns + 1]], device=self.plan.device)
        # A cache without windows: rows behind padding need columns that a window would have forgotten.
        found = self.prefill(rows[:1], ids, torch.ones_like(ids), targets, DynamicCache())
        offsets = torch.tensor([self.plan.offsets[row] for row in rows], device=self.plan.device)
        places = (torch.arange(columns, device=self.plan.device) - offsets[:, None]).clamp(min=0)  # (U, columns)
        cache = lay_out(found.cache, places, self.model.config.get_text_config(decoder=True))
        if found.scores is None or found.bad is None:
            return SharedPrefill(columns, cache, None, None)
        scores = TokenScores(*(column[0][places] for column in found.scores))
        return SharedPrefill(columns, cache, scores, found.bad[0][places])

    def unique_rows(
        self, rows: list[int], ids: Tensor, mask: Tensor, targets: Tensor, before: SharedPrefill | None
    ) -> SharedPrefill:
        """Prefill the unique rows, from the cache of the common prefix. ids, mask, targets: (B, T)."""
        cache = None if before is None else before.cache
        return self.prefill(rows, ids[rows], mask[rows], targets[rows], cache, before)

    def all_rows(self, shared: SharedPrefill, index: Tensor) -> SharedPrefill:
        """Give each row a copy of its unique row's cache and scores. index: (B,)."""
        if len(set(index.tolist())) == len(index):
            return shared
        scores = None if shared.scores is None else TokenScores(*(column[index] for column in shared.scores))
        bad = None if shared.bad is None else shared.bad[index]
        return SharedPrefill(shared.columns, select_rows(shared.cache, index), scores, bad)

    def prefill(
        self,
        rows: Sequence[int],
        ids: Tensor,
        mask: Tensor,
        targets: Tensor,
        cache: Any,
        before: SharedPrefill | None = None,
    ) -> SharedPrefill:
        """Prefill ids (N, T), whose first columns `cache` may hold; score the targets if wanted.

        `rows` (N) are these rows' indices in the batch.
        """
        chunk = chunk_of(self.model, self.generate, ids, self.plan.chunk_bytes) if self.scored else None
        scorer = None
        if self.scored:
            scorer = PromptScorer(
                type(self.model).__name__,
                targets,
                columns=ids.shape[1],
                chunk=chunk,
                asked=self.plan.asked.of_rows(rows),
                chunk_bytes=self.plan.chunk_bytes,
            )
            if before is not None:
                scorer.take(before.scores, before.bad)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=1, return_dict_in_generate=True, prefill_chunk_size=chunk
        )
        given = {} if cache is None else {CACHE_NAME: cache}
        output = self.generate(ids, attention_mask=mask, generation_config=config, observer=scorer, **given)
        scores, bad = (None, None) if scorer is None else scorer.found()
        return SharedPrefill(ids.shape[1], cache_in(output), scores, bad)
