"""Continuous batching against sorted batches: requests of ragged lengths that want different numbers of tokens.

Ratios are of whole calls in one run, managers and caches made anew in each; both sides draw with seeds, and their
tokens are compared. What it does not do: it asserts no time.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .loops import TEMPERATURE, TOP_P, Models
from .measure import Effort, Line, in_turn, line


class Requests(NamedTuple):
    """So many requests, prompts from the shortest to the longest, and from the fewest to the most new tokens."""

    count: int
    shortest: int
    longest: int
    fewest: int
    most: int
    rows: int  # of the other side's batches

    def lengths(self) -> list[int]:
        """Of the prompts, in no order."""
        return [self._spread(7 * row, self.shortest, self.longest) for row in range(self.count)]

    def limits(self) -> list[int]:
        """Most new tokens of each, in another order."""
        return [self._spread(11 * row + 5, self.fewest, self.most) for row in range(self.count)]

    def _spread(self, place: int, least: int, most: int) -> int:
        return least + (place % self.count) * (most - least) // (self.count - 1)


def against_sorted_batches(
    models: Models, effort: Effort, case: Requests, at_most: float | None = 0.75
) -> Iterator[Line]:
    """All requests at once against batches of them, sorted by the length of the prompt as `batch` does."""
    prompts, limits = models.prompts(case.lengths()), case.limits()
    seeds = list(range(case.count))
    order = sorted(range(case.count), key=lambda row: -len(prompts[row]))
    draw = {"temperature": TEMPERATURE, "top_p": TOP_P, "eos_token_id": []}

    def continuous() -> list[list[int]]:
        out = models.ours.generate_batch(prompts, max_gen_len=limits, seeds=seeds, **draw)
        return [result.generated_tokens for result in out.values()]

    def batches() -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        for first in range(0, case.count, case.rows):
            rows = order[first : first + case.rows]
            out = models.ours.generate(
                [prompts[row] for row in rows],
                max_gen_len=[limits[row] for row in rows],
                seeds=[seeds[row] for row in rows],
                **draw,
            )
            tokens.update(zip(rows, out.tokens, strict=True))
        return [tokens[row] for row in range(case.count)]

    agree = sum(mine == other for mine, other in zip(continuous(), batches(), strict=True))
    what = (
        f"{case.count} requests of {case.shortest} to {case.longest}, {case.fewest} to {case.most} new tokens, seeds, "
        "continuous batching"
    )
    measured = line(what, f"our batches of {case.rows}, sorted", at_most, *in_turn([continuous, batches], effort))
    yield measured._replace(note=f"{measured.note}; {agree} of {case.count} equal")
