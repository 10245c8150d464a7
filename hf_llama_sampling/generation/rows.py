"""Collect rows: split the columns of a run into each row's tokens and scores.

What this module does not do: it cuts nothing at an EOS; `trimming` does.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .edits import for_each_part
from .inputs import beside_tokens, lay_out_beside_tokens
from .loop import Finished, LoopState, row_spans, run_loop
from .options import Call
from .plan import Plan
from .prompt_cache import PromptCache, ReadTexts
from .releases import CACHE_NAME
from .scoring import (
    NamedLogprobs,
    TokenScores,
    TopLogprobs,
    concatenate,
    prefill_only,
    row_scores,
    unscored,
    unshifted_row_scores,
)

_EXTRAS = ("output_logits", "output_attentions", "output_hidden_states")


@dataclass
class Rows:
    """Each row's prompt and completion with its EOS, and the scores beside each token, if they were asked for."""

    tokens: list[list[int]]
    stopped: list[bool]  # by a criterion of the caller's
    logprobs: list[list[float]]
    top_logprobs: list[list[TopLogprobs]]
    logprobs_of: list[list[NamedLogprobs]]
    temperature_logprobs: list[list[float]]
    sampled_logprobs: list[list[float]]
    nucleus_mass: list[list[float]]


def run_parts(
    model: Any, generate: Callable[..., Any], plan: Plan, call: Call, prompt_cache: PromptCache | None
) -> tuple[Rows, dict[str, Any]]:
    """Run a plan, split as `apart` says; return its rows in order, and the loop's extras if there was one part.

    Extras of several parts do not line up. The prompt cache is emptied first, and filled when the run has succeeded.
    """
    parts = plan.parts()
    if len(parts) > 1:
        _refuse_for_parts(call)
    runs = _run(model, generate, parts, call, prompt_cache)
    collected = [collect_rows(part, run) for part, run in zip(parts, runs, strict=True)]
    if len(parts) == 1:
        return collected[0], runs[0].extras
    order = sorted(range(len(plan.prompts)), key=[row for part in parts for row in part.row_ids].__getitem__)

    def joined(name: str) -> list[Any]:
        values = [value for rows in collected for value in getattr(rows, name)]
        return [values[place] for place in order] if values else []

    return Rows(*(joined(field.name) for field in fields(Rows))), {}


def _run(
    model: Any, generate: Callable[..., Any], parts: list[Plan], call: Call, prompt_cache: PromptCache | None
) -> list[Finished]:
    """Run the parts one after the other."""
    calls = for_each_part(call, len(parts))
    if prompt_cache is None or not any(part.steps for part in parts):
        return [run_loop(model, generate, part, own) for part, own in zip(parts, calls, strict=True)]
    texts = [ReadTexts() for _ in parts]
    earlier = prompt_cache.take_out(model)
    for one in texts:
        one.earlier = list(earlier)
    del earlier  # so that a run can free these texts before it needs memory
    runs = [run_loop(model, generate, part, own, one) for part, own, one in zip(parts, calls, texts, strict=True)]
    prompt_cache.keep(model, [text for one in texts for text in one.read])
    return runs


def _refuse_for_parts(call: Call) -> None:
    """Refuse arguments that only one run can take: a streamer, `max_time`, a cache, inputs beside the ids, extras."""
    beside = [name for name, value in call.to_model.items() if isinstance(value, Tensor) or name == CACHE_NAME]
    beside += beside_tokens(call.to_model)
    names = [name for name in ("streamer",) if call.to_loop.get(name) is not None]
    names += [name for name in ("max_time",) if call.options.get(name) is not None]
    names += [name for name in _EXTRAS if call.options.get(name)]
    for name in names + beside:
        raise ValueError(
            f"{name} goes with one run, and rows of this model run apart, since they would change each other: pass "
            "one prompt at a time"
        )


def collect_rows(plan: Plan, run: Finished) -> Rows:
    """Split the columns of a run into rows."""
    state, sequences, prompt_scores = run.state, run.sequences, run.prompt_scores
    width = sequences.shape[1]
    spans = row_spans(plan, run.stops, width)
    tokens = [row[span] for row, span in zip(sequences.tolist(), spans, strict=True)]
    rows = Rows(tokens, state.by_criterion, [], [], [], [], [], [])
    if not plan.wants_scores:
        return rows
    columns = _score_columns(plan, state, prompt_scores.columns, width)
    for row, span in enumerate(spans):
        scores = row_scores(columns, row, span, plan.asked)
        if prompt_scores.rows is not None:
            scores = scores.after(prompt_scores.rows[row])
        rows.logprobs.append(scores.logprobs)
        rows.top_logprobs.append(scores.top_logprobs)
        rows.logprobs_of.append(scores.named)
    _collect_draws(rows, plan, state, width - plan.start, spans)
    return rows


def _collect_draws(rows: Rows, plan: Plan, state: LoopState, made: int, spans: list[slice]) -> None:
    """Collect the probabilities that tokens were drawn with; 1 for prompt tokens, as for greedy ones."""
    blank = torch.ones(len(spans), plan.start, device=plan.device)
    probs, masses = (
        torch.cat([blank, *(values[:, None] for values in steps[:made])], 1)  # (B, columns)
        for steps in (state.softmax_probs, state.nucleus_masses)
    )
    for values, found in (
        (probs.log(), rows.temperature_logprobs),
        ((probs / masses).log(), rows.sampled_logprobs),
        (masses, rows.nucleus_mass),
    ):
        found += [row[span] for row, span in zip(values.tolist(), spans, strict=True)]


def _score_columns(plan: Plan, state: LoopState, prompts: TokenScores | None, width: int) -> TokenScores:
    """Join the scores of all columns, prompts first, with 0.0 for columns without scores."""
    steps = state.scores[: width - plan.start]
    blank = width - (0 if prompts is None else prompts.logprobs.shape[1]) - len(steps)
    return concatenate(
        [
            *[unscored(blank, plan.asked)] * (blank > 0),
            *([] if prompts is None else [prompts]),
            *steps,
        ]
    )


def unshifted_rows(model: Any, generate: Callable[..., Any], plan: Plan, model_kwargs: dict[str, Any]) -> Rows:
    """Score the rows of a call with nothing to generate, as `compat="meta"` does.

    The reference then scores each token under the logits of its own column instead of the column before
    (facebookresearch/llama, ``llama/generation.py``, ``if min_prompt_len == total_len``).
    """
    ids, mask = plan.layout
    given = lay_out_beside_tokens(model_kwargs, mask)
    scorer = prefill_only(model, generate, ids, ids, plan.asked, plan.chunk_bytes, given)
    columns = scorer.scores(plan.offsets)
    whole = slice(0, plan.start)
    scores = [unshifted_row_scores(columns, row, whole, plan.asked) for row in range(len(plan.prompts))]
    nothing_drawn = [[0.0] * length for length in plan.lengths]
    return Rows(
        tokens=[list(prompt) for prompt in plan.prompts],
        stopped=[False] * len(plan.prompts),
        logprobs=[row.logprobs for row in scores],
        top_logprobs=[row.top_logprobs for row in scores],
        logprobs_of=[row.named for row in scores],
        temperature_logprobs=nothing_drawn,
        sampled_logprobs=nothing_drawn,
        nucleus_mass=[[1.0] * length for length in plan.lengths],
    )
