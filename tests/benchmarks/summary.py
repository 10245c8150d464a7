"""The README's summary of speed: five rows of the table in docs/performance.md, printed and drawn.

    python -m tests.benchmarks.summary docs/images/speed.png

It measures nothing: `python -m tests.benchmarks` prints the table that the page holds.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent.parent / "docs" / "performance.md"
INK, BARS, EQUAL = "#768390", "#3b82f6", "#e5793a"  # each readable on white and on near-black


class Bar(NamedTuple):
    """A row of the summary: the words to show, and by which words of the table its figure is found."""

    what: str
    against: str
    row: str
    other: str


BARS_SHOWN = [
    Bar(
        "a draw, vocabulary of 32,000, one stream per prompt",
        "transformers' warpers and `multinomial`",
        "a draw, one stream per prompt, peaked logits, V = 32,000, B = 1",
        "transformers' warpers and multinomial",
    ),
    Bar(
        "64 tokens with logprobs and echo, 8 prompts of 256",
        "transformers: `output_logits` and a second forward",
        "64 tokens with logprobs and echo, Meta's stream, B = 8, prompts of 256",
        "transformers: `output_logits` and a forward",
    ),
    Bar(
        "32 tokens for 8 ragged prompts of 16 to 400",
        "transformers, left-padded",
        "ragged batch of 8, 16 to 400, 32 new tokens, one stream per prompt",
        "transformers, left-padded, no logprobs",
    ),
    Bar(
        "multiple choice: a header of 500, 8 questions of 60, 4 choices",
        "lm-evaluation-harness, `HFLM`",
        "multiple choice: header 500, 8 contexts of 60, 4 continuations of 6 tokens",
        "lm-evaluation-harness, `HFLM`, batch 8",
    ),
    Bar(
        "memory for logprobs and echo, 8 rows of 512 + 256 tokens",
        "transformers: `output_logits` and a second forward",
        "extra peak memory for logprobs and echo, B = 8, 512 + 256 tokens, V = 49,152",
        "transformers' recipe",
    ),
]


def figures(page: str) -> list[float]:
    """The summary's figures, as the page's table has them."""
    table = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        number = re.match(r"\**(\d+\.\d+)", cells[3]) if len(cells) >= 4 else None
        if number:
            table[cells[0], cells[1]] = float(number[1])
    return [table[bar.row, bar.other] for bar in BARS_SHOWN]


def markdown(values: Sequence[float]) -> str:
    """The README's table."""
    rows = [f"| {bar.what} | {bar.against} | {value:.2f} |" for bar, value in zip(BARS_SHOWN, values, strict=True)]
    return "\n".join(["| what | against | ratio |", "|---|---|---|", *rows])


def draw(file: Path, values: Sequence[float]) -> None:
    """Bars on a transparent ground, so that the picture reads on a light and on a dark page."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    places = range(len(values))
    axes.barh(places, values, color=BARS, height=0.55)
    axes.axvline(1.0, color=EQUAL, linewidth=1.5)
    axes.text(1.0, -0.62, " equal", color=EQUAL, va="center", fontsize=10)
    for place, value in zip(places, values, strict=True):
        inside = value > 0.5
        at, side, color = (value - 0.012, "right", "white") if inside else (value + 0.012, "left", INK)
        axes.text(at, place, f"{value:.2f}", color=color, ha=side, va="center", fontsize=11, fontweight="bold")
    labels = [f"{bar.what}\nagainst {bar.against}".replace("`", "") for bar in BARS_SHOWN]
    axes.set_yticks(places, labels, fontsize=9.5)
    axes.set(xlim=(0, max(1.1, *values) + 0.08), ylim=(len(values) - 0.5, -0.9))
    axes.set_xlabel("ratio to the other, less is better", color=INK)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(file, dpi=160, transparent=True)
    plt.close(figure)


if __name__ == "__main__":
    measured = figures(PAGE.read_text())
    print(markdown(measured))
    for name in sys.argv[1:]:
        draw(Path(name), measured)
