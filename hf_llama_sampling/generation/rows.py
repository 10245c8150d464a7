"""Collecting rows: the columns that a run made become, row by row, tokens and the scores beside them.

What this module does not do: it cuts nothing at an EOS; `trimming` does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .loop import Finished, LoopState
from .plan import Plan
from .scoring import (
    RowScores,
    TokenScores,
    TopLogprobs,
    concatenate,
    prefill_only,
    row_scores,
    unscored,
    unshifted_row_scores,
)


@dataclass
class Rows:
    """Each row's prompt and completion with its EOS, and the scores beside each token, if they were asked for."""

    tokens: list[list[int]]
    stopped: list[bool]  # by a criterion of the caller's
    logprobs: list[list[float]]
    sampled_logprobs: list[list[float]]
    top_logprobs: list[list[TopLogprobs]]


def collect_rows(plan: Plan, run: Finished) -> Rows:
    """Rows out of the columns of a run."""
    state, sequences, prompt_scores = run.state, run.sequences, run.prompt_scores
    width = sequences.shape[1]
    ends = [min(end, stop, width) for end, stop in zip(plan.ends.tolist(), run.stops, strict=True)]
    spans = [slice(offset, end) for offset, end in zip(plan.offsets, ends, strict=True)]
    tokens = [row[span] for row, span in zip(sequences.tolist(), spans, strict=True)]
    rows = Rows(tokens, state.by_criterion, [], [], [])
    if not plan.wants_scores:
        return rows
    made = width - plan.start
    columns = _score_columns(plan, state, prompt_scores.columns, width)
    drawn = torch.stack(state.drawn_with[:made], 1).log() if state.drawn_with else columns.logprobs[:, :0]
    for row, span in enumerate(spans):
        scores = row_scores(columns, row, span)
        if prompt_scores.rows is not None:
            scores = _with_prompt(prompt_scores.rows[row], scores, plan.lengths[row])
        rows.logprobs.append(scores.logprobs)
        rows.top_logprobs.append(scores.top_logprobs)
        given = plan.start - span.start
        rows.sampled_logprobs.append(([0.0] * given + drawn[row].tolist())[: len(tokens[row])])
    return rows


def _score_columns(plan: Plan, state: LoopState, prompts: TokenScores | None, width: int) -> TokenScores:
    """The scores of all columns, those of the prompts first, with 0.0 where nothing was scored."""
    steps = state.scores[: width - plan.start]
    blank = width - (0 if prompts is None else prompts.logprobs.shape[1]) - len(steps)
    return concatenate(
        [
            *[unscored(len(plan.prompts), blank, plan.top_logprobs, plan.device)] * (blank > 0),
            *([] if prompts is None else [prompts]),
            *steps,
        ]
    )


def _with_prompt(prompt: RowScores, row: RowScores, length: int) -> RowScores:
    """A row's scores with those of its prompt replaced."""
    return RowScores(prompt.logprobs + row.logprobs[length:], prompt.top_logprobs + row.top_logprobs[length:])


def unshifted_rows(model: Any, generate: Callable[..., Any], plan: Plan, model_kwargs: dict[str, Any]) -> Rows:
    """The rows of a call with nothing to generate, as `compat="meta"` scores them.

    The reference then scores each token under the logits of its own column instead of the column before
    (facebookresearch/llama, ``llama/generation.py``, ``if min_prompt_len == total_len``).
    """
    ids, _ = plan.layout()
    scorer = prefill_only(model, generate, ids, ids, plan.top_logprobs, plan.chunk_bytes, model_kwargs)
    columns = scorer.scores(plan.offsets)
    whole = slice(0, plan.start)
    scores = [unshifted_row_scores(columns, row, whole) for row in range(len(plan.prompts))]
    return Rows(
        tokens=[list(prompt) for prompt in plan.prompts],
        stopped=[False] * len(plan.prompts),
        logprobs=[row.logprobs for row in scores],
        sampled_logprobs=[[0.0] * length for length in plan.lengths],
        top_logprobs=[row.top_logprobs for row in scores],
    )
