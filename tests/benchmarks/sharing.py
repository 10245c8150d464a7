"""Prompts that share beginnings: samples of one prompt, a common header, multiple choice against the harness.

Ratios are of whole calls in one run; totals are compared in the same run. What it does not do: it asserts no time.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .loops import TEMPERATURE, TOP_P, Models
from .measure import Effort, Line, in_turn, line

CLOSE = 1e-3  # of a continuation's total, as the harness rounds


class Header(NamedTuple):
    """A header of so many tokens, rows with so many of their own, and so many new ones."""

    header: int
    own: int
    rows: int
    new: int


class Choices(NamedTuple):
    """Contexts with a header in common, each with continuations of a length."""

    header: int
    contexts: int
    own: int
    choices: int
    length: int

    def __str__(self) -> str:
        tokens = "token" if self.length == 1 else "tokens"
        return (
            f"multiple choice: header {self.header}, {self.contexts} contexts of {self.own}, "
            f"{self.choices} continuations of {self.length} {tokens}"
        )


def samples(models: Models, effort: Effort, case: Header) -> Iterator[Line]:
    """Samples of one prompt against transformers' `num_return_sequences`."""
    prompt = models.prompts([case.header])[0]
    ids = torch.tensor([prompt])
    runs = [
        lambda: ours(models, [prompt], case.new, num_return_sequences=case.rows),
        lambda: models.theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new, num_return_sequences=case.rows
        ),
    ]
    what = f"{case.rows} samples of one prompt of {case.header}, {case.new} new tokens, seeds"
    yield line(what, "transformers, `num_return_sequences`", 0.45, *in_turn(runs, effort))


def common_header(models: Models, effort: Effort, case: Header) -> Iterator[Line]:
    """Prompts with a common header against transformers' batch of them."""
    header = models.prompts([case.header])[0]
    ends = models.prompts([case.own] * case.rows)
    prompts = [[*header, 10 + row, *end[1:]] for row, end in enumerate(ends)]
    ids = torch.tensor(prompts)
    runs = [
        lambda: ours(models, prompts, case.new),
        lambda: models.theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=case.new),
    ]
    what = f"{case.rows} prompts, a common header of {case.header} and {case.own} of their own, {case.new} new tokens"
    yield line(what, "transformers, left-padded batch", 0.55, *in_turn(runs, effort))


def ours(models: Models, prompts: list[list[int]], new: int, **options: Any) -> Any:
    """The same work here, with seeds."""
    return models.ours.generate(prompts, max_gen_len=new, temperature=TEMPERATURE, top_p=TOP_P, seeds=0, **options)


def multiple_choice(models: Models, effort: Effort, case: Choices, at_most: float) -> Iterator[Line]:
    """`score_continuations` against the harness' own model on the same ids; totals and greedy ones compared."""
    runs = scorers(models, case)
    found, expected = (run() for run in runs)
    for mine, other in zip(found, expected, strict=True):
        assert abs(mine[0] - other[0]) <= CLOSE and mine[1] == other[1], (mine, other)
    yield line(str(case), "lm-evaluation-harness, `HFLM`, batch 8", at_most, *in_turn(runs, effort))


def scorers(models: Models, case: Choices) -> list[Callable[[], list[tuple[float, bool]]]]:
    """`score_continuations`, and the harness' own model; each answers total and greedy or not per continuation."""
    contexts, continuations = questions(models, case)
    requests = [
        ((str(i), str(j)), context, ids) for i, context in enumerate(contexts) for j, ids in enumerate(continuations[i])
    ]
    harness = harness_model(models.theirs)

    def mine() -> list[tuple[float, bool]]:
        out = models.ours.score_continuations(contexts, continuations)
        return [pair for pairs in zip(out.totals, out.is_greedy, strict=True) for pair in zip(*pairs, strict=True)]

    def theirs() -> list[tuple[float, bool]]:
        with contextlib.redirect_stderr(io.StringIO()):
            return list(harness._loglikelihood_tokens(requests, disable_tqdm=True))

    return [mine, theirs]


def questions(models: Models, case: Choices) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Contexts and continuations cut from the text; their first tokens keep them apart."""
    header = models.prompts([case.header])[0] if case.header else []
    owns = models.prompts([case.own] * case.contexts)
    contexts = [[*header, 10 + row, *own[1:]] for row, own in enumerate(owns)]
    ends = models.prompts([case.length] * case.contexts * case.choices)
    listed = [
        [[100 + choice, *ends[row * case.choices + choice][1:]] for choice in range(case.choices)]
        for row in range(case.contexts)
    ]
    return contexts, listed


def harness_model(model: Any) -> Any:
    """The harness' model around these weights; it is given ids, so any tokenizer will do."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from ..conftest import TINY

    return HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(TINY), batch_size=8)
