"""Costs as pictures: by length and vocabulary, and by what prompts share. The only module that needs matplotlib."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

from .draws import FLAT, PEAKED, Draws
from .loops import Models, bare_loop, cached, continued
from .measure import Effort, in_turn
from .sharing import Choices, scorers


def plot(file: Path, models: Models, effort: Effort, *, lengths: Sequence[int], vocabularies: Sequence[int]) -> None:
    """Two panels: milliseconds per token by length, and per draw by vocabulary."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_length(left, models, effort, lengths)
    by_vocabulary(right, effort, vocabularies)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def by_length(axes: Any, models: Models, effort: Effort, lengths: Sequence[int], *, steps: int = 8) -> None:
    """A decode step over a cache of each length: sampling with logprobs here, and the bare loop."""
    curves: list[list[float]] = [[], []]
    for length in lengths:
        ids, cache = cached(models, length)
        times = in_turn(
            [
                lambda ids=ids, cache=cache: continued(models, ids, cache, steps),
                lambda ids=ids, cache=cache: bare_loop(
                    models.theirs, ids[:, -1:], steps, cache=cache(), last_only=True
                ),
            ],
            effort,
        )
        for curve, measured in zip(curves, times, strict=True):
            curve.append(1e3 * statistics.median(measured) / steps)
    axes.plot(lengths, curves[0], marker="o", label="sampling with logprobs, here")
    axes.plot(lengths, curves[1], marker="o", linestyle="--", color="gray", label="bare loop: forward + argmax")
    axes.set(xlabel="tokens before", ylabel="ms per new token", title="Cost against length", ylim=(0, None))
    axes.legend()


def by_vocabulary(axes: Any, effort: Effort, sizes: Sequence[int]) -> None:
    """A draw of one row, here and as transformers and the reference draw, from peaked and flat logits."""
    ways = ["one_stream_per_prompt", "metas_stream", "transformers", "reference"]
    names = ["here, one stream per prompt", "here, Meta's stream", "transformers", "the reference"]
    colors = ["tab:blue", "tab:orange", "gray", "black"]
    for deviation, style in ((PEAKED, "-"), (FLAT, ":")):
        curves: list[list[float]] = [[] for _ in ways]
        for vocab in sizes:
            draws = Draws(vocab, 1, deviation)
            times = in_turn([getattr(draws, way) for way in ways], effort)
            for curve, measured in zip(curves, times, strict=True):
                curve.append(1e3 * statistics.median(measured))
        for curve, name, color in zip(curves, names, colors, strict=True):
            label = name if deviation == PEAKED else None
            axes.plot(sizes, curve, style, marker="o", color=color, label=label)
    axes.set(xlabel="vocabulary", ylabel="ms per draw (solid: peaked logits, dotted: flat)", title="Cost of a draw")
    axes.set(xscale="log", yscale="log")
    axes.legend()


def plot_sharing(
    file: Path, models: Models, effort: Effort, case: Choices, *, choices: Sequence[int], headers: Sequence[int]
) -> None:
    """Two panels: seconds of a multiple-choice task by the choices of a question, and by the length of its header."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    by_tokens = f"{case.contexts} questions of {case.own} tokens"
    for axes, name, values, fixed in (
        (left, "choices", choices, f"header of {case.header}"),
        (right, "header", headers, f"{case.choices} choices"),
    ):
        curves: list[list[float]] = [[], []]
        for value in values:
            for curve, measured in zip(
                curves, in_turn(scorers(models, case._replace(**{name: value})), effort), strict=True
            ):
                curve.append(min(measured))
        axes.plot(values, curves[0], marker="o", label="score_continuations, here")
        axes.plot(values, curves[1], marker="o", linestyle="--", color="gray", label="lm-evaluation-harness, batch 8")
        label = "choices per question" if name == "choices" else "tokens of the common header"
        axes.set(xlabel=f"{label} ({by_tokens}, {fixed})", ylim=(0, None), title=f"Cost against {label}")
        axes.set_xticks(values)
    left.set_ylabel("seconds")
    left.legend()
    figure.savefig(file, dpi=150)
    plt.close(figure)
