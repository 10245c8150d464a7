"""The random numbers of a draw, under two contracts. Every draw is a race: the least ``Exp(1) / p`` wins.

* **Meta's stream** (`MetaStream`, `LookAhead`): one torch generator, (B, V) values a step in the reference's order,
  indexed by a token's rank in the sorted nucleus. The same seed gives the reference's tokens.
* **One stream per prompt** (`PromptStreams`): a value is a function of (the row's seed, the position in the row, the
  token id) and of nothing else, so a row's draws do not depend on its batch, the schedule or the device.

The counter-based generator is Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): its
Philox4x32-10 turns (seed, position) into the key and counter of a Philox2x32-10 over token ids. What this module does
not do: it knows nothing of probabilities.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_2 = 0xD256D193
_MULTIPLIERS_4 = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# What `LookAhead` may keep of the draws it made ahead, and the fewest ranks of each that it keeps whatever that costs.
LOOK_AHEAD_BYTES = 32 << 20
LEAST_RANKS = 32
_BLOCK = 64  # positions whose keys are derived at once
_SPAN = 1 << 16  # token ids whose words are computed at once on CPU

Words = TypeVar("Words", Tensor, "np.ndarray[Any, Any]")


def exponential(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """(B, V) float32 Exp(1) values as ``torch.multinomial`` draws them for a tensor of this shape."""
    return torch.empty(tuple(shape), dtype=torch.float32, device=device).exponential_(1.0, generator=generator)


class Block:
    """One step's (B, V) Exp(1) values, drawn at once; those that are asked for are computed then.

    On CPU a value is made of one 64-bit word of the generator, and its logarithm costs several times the word. A
    nucleus is a few ranks, so the words alone are drawn, if this build of torch is seen to make its values so.

    One buffer serves all steps: fresh ones among what is kept for long would leave holes that no other fits.
    """

    def __init__(self) -> None:
        self.words = False
        self.drawn = torch.empty(0)

    def draw(self, shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> None:
        """Draw the next block over the last one."""
        if self.drawn.shape != tuple(shape) or self.drawn.device.type != device.type:
            self.words = device.type == "cpu" and _a_word_makes_a_value()
            dtype = torch.long if self.words else torch.float32
            self.drawn = torch.empty(tuple(shape), dtype=dtype, device=device)
        if self.words:
            self.drawn.random_(generator=generator)
        else:
            self.drawn.exponential_(1.0, generator=generator)

    def first(self, ranks: int, rows: Tensor | None = None) -> Tensor:
        """(R, ranks): the first ranks of all rows, or of some; good until the next draw."""
        drawn = self.drawn[:, :ranks] if rows is None else self.drawn[:, :ranks][rows]
        return _exponential_of(drawn) if self.words else drawn


def _exponential_of(words: Tensor) -> Tensor:
    """What ``exponential_`` makes of these words on CPU: ``-log1p(-u)`` in float64 of 53 bits, rounded to float32.

    torch's vectorized log1p and the C library's, which ``exponential_`` calls, may differ in the last bit of the
    float64. Where four times that would round to another float32, about once in 2**26 values, the C library is asked.
    """
    uniform = (words & ((1 << 53) - 1)).double().mul_(2.0**-53)
    exact = torch.log1p(-uniform).neg_()
    values = (exact * (1 + 2.0**-50)).float()
    unsure = (values != (exact * (1 - 2.0**-50)).float()).numpy()
    for place in zip(*unsure.nonzero(), strict=True):
        values[place] = -math.log1p(-float(uniform[place]))
    return values


@functools.cache
def _a_word_makes_a_value() -> bool:
    """Whether this build draws Exp(1) values as `_exponential_of` does; one with MKL's generators does not."""
    one, other = (torch.Generator().manual_seed(0) for _ in range(2))
    values = _exponential_of(torch.empty(1000, dtype=torch.long).random_(generator=one))
    as_torch_does = exponential((1000,), torch.device("cpu"), other)
    return torch.equal(values, as_torch_does) and torch.equal(one.get_state(), other.get_state())


class MetaStream:
    """The reference's draws, one (B, V) block a step."""

    by_rank = True

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.block = Block()

    def step(
        self, shape: Sequence[int], device: torch.device, column: int
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """This step's noise. Draws at once: the reference consumes a block in every step, whatever is then used."""
        self.block.draw(shape, device, self.generator)
        return lambda tokens, rows: self.block.first(tokens.shape[1], rows)


class LookAhead:
    """The reference's draws for rows that run ahead of the reference.

    In the padded schedule, row i is at its own step j when the reference would be at step ``j + lag_i`` with
    ``lag_i = len_i - min(len)``. Blocks are drawn in the reference's order as far ahead as the longest row needs. Of
    each, the first ranks are kept until the shortest row has passed it, and the generator's state before it for
    good: a wider nucleus has its block drawn again.

    Memory: `LOOK_AHEAD_BYTES` (or `LEAST_RANKS` ranks) at any raggedness, one block, and one generator state a step
    (5 KB on CPU, 16 bytes on CUDA).
    """

    by_rank = True

    def __init__(self, lengths: Sequence[int], first_column: int, generator: torch.Generator | None) -> None:
        self.lags = [length - min(lengths) for length in lengths]
        self.first_column = first_column
        self.given = generator
        self.block = Block()
        self.states: list[Tensor] = []  # before each block drawn so far
        self.kept: deque[Tensor] = deque()  # the last max(lags) + 1 blocks, (B, ranks) each

    def step(
        self, shape: Sequence[int], device: torch.device, column: int
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """The noise of each row's own step, which the reference would come to `lag` steps later."""
        step, depth = column - self.first_column, max(self.lags) + 1
        generator = self._generator(device)
        ranks = min(shape[1], max(LEAST_RANKS, LOOK_AHEAD_BYTES // (4 * shape[0] * depth)))
        while len(self.states) < step + depth:
            self.states.append(generator.get_state())
            self.block.draw(shape, device, generator)
            self.kept.append(self.block.first(ranks).clone())
        while len(self.kept) > depth:
            self.kept.popleft()
        mine = torch.stack([self.kept[lag][row] for row, lag in enumerate(self.lags)])  # (B, ranks)

        def noise(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if tokens.shape[1] <= ranks:
                return (mine if rows is None else mine[rows])[:, : tokens.shape[1]]
            which = list(range(len(self.lags))) if rows is None else rows.tolist()
            return self._again(step, which, shape, device, generator, tokens.shape[1])

        return noise

    def _again(
        self,
        step: int,
        rows: list[int],
        shape: Sequence[int],
        device: torch.device,
        generator: torch.Generator,
        ranks: int,
    ) -> Tensor:
        """(R, ranks): the blocks of these rows' own steps, drawn again from the states before them."""
        now = generator.get_state()
        drawn: dict[int, Tensor] = {}
        for lag in sorted({self.lags[row] for row in rows}):
            generator.set_state(self.states[step + lag])
            self.block.draw(shape, device, generator)
            mine = sorted({row for row in rows if self.lags[row] == lag})
            drawn.update(zip(mine, self.block.first(ranks, torch.tensor(mine, device=device)), strict=True))
        generator.set_state(now)
        return torch.stack([drawn[row] for row in rows])

    def leave_after(self, steps: int, shape: Sequence[int], device: torch.device) -> None:
        """Leave the generator as the reference would after so many steps."""
        generator = self._generator(device)
        for _ in range(steps - len(self.states)):
            self.states.append(generator.get_state())
            self.block.draw(shape, device, generator)
        if steps < len(self.states):
            generator.set_state(self.states[steps])

    def _generator(self, device: torch.device) -> torch.Generator:
        """The generator to save and restore: the caller's, or the device's global one."""
        if self.given is not None:
            return self.given
        if device.type == "cpu":
            return torch.default_generator
        module = torch.get_device_module(device)
        index = module.current_device() if device.index is None else device.index
        return module.default_generators[index]  # type: ignore[no-any-return]


class PromptStreams:
    """One stream per row, from its seed; `copies` tells apart rows that share one (``num_return_sequences``).

    ``first_positions``: the position in its row of the token that stands in column 0 (negative under left padding).
    """

    by_rank = False

    def __init__(self, seeds: Sequence[int], copies: Sequence[int], first_positions: Sequence[int]) -> None:
        self.seeds = torch.tensor([[seed & _WORD, seed >> 32] for seed in seeds], dtype=torch.long)  # (B, 2)
        self.copies = torch.tensor(list(copies), dtype=torch.long)
        self.first_positions = torch.tensor(list(first_positions), dtype=torch.long)
        self.block_start = -1
        self.words = torch.empty(0)

    def step(
        self, shape: Sequence[int], device: torch.device, column: int
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """This step's noise: nothing is computed before it is asked for, and then only for the tokens asked for."""
        start = column - column % _BLOCK
        if start != self.block_start:
            self.block_start, self.words = start, self._row_words(start).to(device)
        key, salt = self.words[:, column - start].unbind(-1)  # (B,) each

        def noise(tokens: Tensor, rows: Tensor | None) -> Tensor:
            some = slice(None) if rows is None else rows
            return token_noise(tokens, key[some, None], salt[some, None])

        return noise

    def _row_words(self, start: int) -> Tensor:
        """(B, block, 2): a key and a salt for each row and each of the next columns."""
        positions = self.first_positions[:, None] + torch.arange(start, start + _BLOCK)  # (B, block)
        copies = self.copies[:, None].expand_as(positions)
        zero = torch.zeros_like(positions)
        words = philox4x32((positions & _WORD, copies, zero, zero), (self.seeds[:, :1], self.seeds[:, 1:]))
        return torch.stack(words[:2], dim=-1)


def token_noise(tokens: Tensor, key: Tensor, salt: Tensor) -> Tensor:
    """(R, K) float32 Exp(1) values for token ids (R, K) under a row's key and salt (R, 1)."""
    words = _words_in_numpy(tokens, key, salt) if tokens.device.type == "cpu" else philox2x32(tokens, salt, key)
    uniform = words.float() * 2.0**-32
    # log1p keeps the small values, which decide the race, at full resolution; the half step keeps 0 out.
    return -torch.log1p(-(uniform + 2.0**-33))


def _words_in_numpy(tokens: Tensor, key: Tensor, salt: Tensor) -> Tensor:
    """`philox2x32` on CPU: NumPy starts an operation in a third of torch's time, and a nucleus is a few tokens.

    Large ones go in spans that stay in the cache; beyond it each operation would wait for fresh pages.
    """
    ids, keys, salts = tokens.numpy(), key.numpy(), salt.numpy()
    if ids.size <= _SPAN:
        return torch.from_numpy(philox2x32(ids, salts, keys))
    words = np.empty(ids.shape, dtype=np.int64)
    for row in range(len(ids)):
        for first in range(0, ids.shape[1], _SPAN):
            span = slice(first, first + _SPAN)
            words[row, span] = philox2x32(ids[row, span], salts[row], keys[row])
    return torch.from_numpy(words)


def philox2x32(counter0: Words, counter1: Words, key: Words) -> Words:
    """The first word of Philox2x32-10. Words are int64 in [0, 2**32); `counter0` has the result's shape.

    int64 products wrap modulo 2**64: their low word is right, and so is their high word below its sign extension. What
    stands above the 32 bits of a word is masked off once a round, before the next product.
    """
    left, right = counter0, counter1
    for round_ in range(_ROUNDS):
        product = left * _MULTIPLIER_2
        left = product >> 32
        left ^= right
        left ^= key + round_ * _WEYL[0]
        left &= _WORD
        right = product
    return left


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of Philox4x32-10, of int64 tensors in [0, 2**32) that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS_4[0], c2 * _MULTIPLIERS_4[1]
        c0, c1 = ((second >> 32) ^ c1 ^ k0) & _WORD, second & _WORD
        c2, c3 = ((first >> 32) ^ c3 ^ k1) & _WORD, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
