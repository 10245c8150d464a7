"""Cost against length and against vocabulary, as a picture. The only module that needs matplotlib."""

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
