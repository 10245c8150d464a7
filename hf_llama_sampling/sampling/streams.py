"""The random numbers of a draw, under two contracts. Every draw is a race: the largest ``p / Exp(1)`` wins.

* **Meta's stream** (`MetaStream`, `LookAhead`): one torch generator, (B, V) values a step in the reference's order,
  indexed by a token's rank in the sorted nucleus. The same seed gives the reference's tokens.
* **One stream per prompt** (`PromptStreams`): a value is a function of (the row's seed, the position in the row, the
  token id) and of nothing else, so a row's draws do not depend on its batch, the schedule or the device.

A stream's ``step(shape, device, column)`` gives the `Noise` of the step that makes this column. What this module does
not do: it knows nothing of probabilities.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fast_path
from .philox import WORD, Array, philox2x32, philox2x32_in_numpy, philox4x32
from .rule import Noise

# Memory that `LookAhead` may use for the draws it made ahead, and the fewest ranks of each that it keeps in any case.
LOOK_AHEAD_BYTES = 32 << 20
LEAST_RANKS = 32
_BLOCK = 64  # columns whose keys are derived at once
# Values that `PromptStreams` may compute ahead on a device, 4 bytes each, beside one column's.
NOISE_AHEAD = 1 << 21


class Block:
    """One step's (B, V) Exp(1) values: drawn at once, and on CPU computed for the ranks that are asked for.

    On CPU a value is made of one 64-bit word of the generator, and its logarithm costs several times the word. So the
    words alone are drawn, if this build of torch is seen to make its values in that way.

    One buffer serves all steps: a new one a step would leave holes in memory between the draws that are kept.
    """

    def __init__(self) -> None:
        self.words = False
        self.drawn = torch.empty(0)

    def draw(self, shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> None:
        """Draw the next block over the last one."""
        if self.drawn.shape != tuple(shape) or self.drawn.device.type != device.type:
            self.words = fast_path.on_cpu(device) and fast_path.words_make_exponentials()
            dtype = torch.long if self.words else torch.float32
            with torch.inference_mode(False):  # a later step may be in another grad mode
                self.drawn = torch.empty(tuple(shape), dtype=dtype, device=device)
        if self.words:
            self.drawn.random_(generator=generator)
        else:
            self.drawn.exponential_(1.0, generator=generator)

    def first(self, ranks: int, rows: Tensor | None = None) -> Tensor:
        """(R, ranks): the first ranks of all rows, or of some; valid until the next draw."""
        drawn = self.drawn[:, :ranks] if rows is None else self.drawn[:, :ranks][rows]
        return fast_path.exponential_of_words(drawn) if self.words else drawn

    def of_row(self, row: int, ranks: int) -> Tensor:
        """(ranks,): a copy of one row's first ranks."""
        drawn = self.drawn[row, :ranks]
        return fast_path.exponential_of_words(drawn) if self.words else drawn.clone()


class MetaStream:
    """The reference's draws, one (B, V) block a step."""

    by_rank = True

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator
        self.block = Block()

    def step(self, shape: Sequence[int], device: torch.device, column: int) -> Noise:
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
        self.generator = generator
        self.block = Block()
        self.states: list[Tensor] = []  # before each block drawn so far
        self.kept: deque[Tensor] = deque()  # the last max(lags) + 1 blocks, (B, ranks) each

    def step(self, shape: Sequence[int], device: torch.device, column: int) -> Noise:
        """The noise of each row's own step, which the reference would come to `lag` steps later."""
        step, depth = column - self.first_column, max(self.lags) + 1
        ranks = min(shape[1], max(LEAST_RANKS, LOOK_AHEAD_BYTES // (4 * shape[0] * depth)))
        while len(self.states) < step + depth:
            self._draw(shape, device)
            self.kept.append(self.block.first(ranks).clone())
        while len(self.kept) > depth:
            self.kept.popleft()
        mine = torch.stack([self.kept[lag][row] for row, lag in enumerate(self.lags)])  # (B, ranks)

        def noise(tokens: Tensor, rows: Tensor | None) -> Tensor:
            if tokens.shape[1] <= ranks:
                return (mine if rows is None else mine[rows])[:, : tokens.shape[1]]
            which = list(range(len(self.lags))) if rows is None else rows.tolist()
            return self._again(step, which, shape, device, tokens.shape[1])

        return noise

    def _draw(self, shape: Sequence[int], device: torch.device) -> None:
        """Draw the next block, and keep the generator's state before it."""
        self.states.append(self._state(device))
        self.block.draw(shape, device, self.generator)

    def _again(self, step: int, rows: list[int], shape: Sequence[int], device: torch.device, ranks: int) -> Tensor:
        """(R, ranks): the blocks of these rows' own steps, drawn again from the states before them."""
        now = self._state(device)
        drawn: dict[int, Tensor] = {}
        for lag in sorted({self.lags[row] for row in rows}):
            self._restore(self.states[step + lag], device)
            self.block.draw(shape, device, self.generator)
            drawn.update({row: self.block.of_row(row, ranks) for row in set(rows) if self.lags[row] == lag})
        self._restore(now, device)
        return torch.stack([drawn[row] for row in rows])

    def leave_after(self, steps: int, shape: Sequence[int], device: torch.device) -> None:
        """Leave the generator as the reference would after so many steps."""
        while len(self.states) < steps:
            self._draw(shape, device)
        if steps < len(self.states):
            self._restore(self.states[steps], device)

    def _state(self, device: torch.device) -> Tensor:
        """The state of the caller's generator, or of torch's global one on the device."""
        if self.generator is not None:
            return self.generator.get_state()
        module, where = _random_module(device)
        return module.get_rng_state(*where)  # type: ignore[no-any-return]

    def _restore(self, state: Tensor, device: torch.device) -> None:
        if self.generator is not None:
            self.generator.set_state(state)
            return
        module, where = _random_module(device)
        module.set_rng_state(state, *where)


def _random_module(device: torch.device) -> tuple[Any, list[torch.device]]:
    """The module whose `get_rng_state` and `set_rng_state` serve a device, and the argument that names the device."""
    if device.type == "cpu":
        return torch, []
    return torch.get_device_module(device), [] if device.type == "mps" else [device]


class PromptStreams:
    """One stream per row, from its seed: Philox4x32 of (position, copy) under the seed keys a Philox2x32 of token ids.

    On CPU, noise is computed for the tokens of a nucleus alone. On other devices, where its size is not known, it is
    computed for all token ids, and for several columns at once: a device runs few large operations faster than many
    small ones.

    Args:
        seeds: one per row.
        copies: tell apart rows that share a seed (``num_return_sequences``).
        first_positions: the position in its row of the token in column 0 (negative under left padding).
    """

    by_rank = False

    def __init__(self, seeds: Sequence[int], copies: Sequence[int], first_positions: Sequence[int]) -> None:
        self.seeds = seed_words(seeds)  # (B, 2)
        self.copies = np.array(list(copies), dtype=np.int64)
        self.first_positions = np.array(list(first_positions), dtype=np.int64)
        # (B, _BLOCK, 2) of the columns from `keys_start` on, and the same on a device that is no CPU
        self.keys: Array = np.empty(0, dtype=np.int64)
        self.device_keys, self.keys_start = torch.empty(0), -1
        self.table, self.table_start = torch.empty(0), -1  # (B, columns, V) of the columns from `table_start` on

    def step(self, shape: Sequence[int], device: torch.device, column: int) -> Noise:
        """This step's noise; on CPU nothing is computed before it is asked for."""
        self._make_keys(column - column % _BLOCK, device)
        if not fast_path.on_cpu(device):
            noise_of_ids = self._table_for(column, shape[1])
            return lambda tokens, rows: noise_of_ids.gather(1, tokens)
        return _noise_on_cpu(self.keys[:, column % _BLOCK])

    def _make_keys(self, start: int, device: torch.device) -> None:
        """Make the key and the salt of each row and each column from `start` on, copied to another device at once."""
        new = start != self.keys_start
        if new:
            positions = self.first_positions[:, None] + np.arange(start, start + _BLOCK)  # (B, _BLOCK)
            self.keys_start, self.keys = start, keys_at(positions, self.copies, self.seeds)
        if not fast_path.on_cpu(device) and (new or self.device_keys.device != device):
            self.device_keys, self.table_start = torch.from_numpy(self.keys).to(device), -1

    def _table_for(self, column: int, vocab_size: int) -> Tensor:
        """(B, V): the noise of all token ids in a column, on the device of the keys."""
        keys = self.device_keys
        columns = _BLOCK
        while columns > 1 and len(keys) * columns * vocab_size > NOISE_AHEAD:
            columns //= 2
        start = column - column % columns
        if start != self.table_start or self.table.shape[1:] != (columns, vocab_size):
            first = start % _BLOCK
            key, salt = keys[:, first : first + columns, :1], keys[:, first : first + columns, 1:]
            ids = torch.arange(vocab_size, device=keys.device).expand(len(keys), columns, vocab_size)
            self.table_start, self.table = start, token_noise(ids, key, salt)
        return self.table[:, column - start]


def seed_words(seeds: Sequence[int]) -> Array:
    """(B, 2): the low and the high 32 bits of each seed."""
    return np.array([[seed & WORD, seed >> 32] for seed in seeds], dtype=np.int64)


def keys_at(positions: Array, copies: Array, seeds: Array) -> Array:
    """The key and the salt under which token ids become noise.

    Args:
        positions: (B, K), of the tokens in their rows.
        copies: (B,), tell apart rows that share a seed.
        seeds: (B, 2), of `seed_words`.

    Returns:
        (B, K, 2): a key and a salt for each position.
    """
    zero = np.zeros_like(positions)
    words = philox4x32((positions & WORD, copies[:, None] + zero, zero, zero), (seeds[:, :1], seeds[:, 1:]))
    return np.stack(words[:2], axis=-1)


def noise_under(keys: Tensor) -> Noise:
    """The noise of a step, computed for the tokens that are asked for. keys: (B, 2), a key and a salt."""
    if fast_path.on_cpu(keys):
        return _noise_on_cpu(keys.numpy())
    key, salt = keys[:, :1], keys[:, 1:]
    return lambda tokens, rows: (
        token_noise(tokens, key, salt) if rows is None else token_noise(tokens, key[rows], salt[rows])
    )


def _noise_on_cpu(keys: Array) -> Noise:
    def noise(tokens: Tensor, rows: Tensor | None) -> Tensor:
        some = keys if rows is None else keys[rows.numpy()]
        return _exponential(philox2x32_in_numpy(tokens, some[:, 1:], some[:, :1]))

    return noise


def token_noise(tokens: Tensor, key: Tensor, salt: Tensor) -> Tensor:
    """Float32 Exp(1) values for token ids (R, K) under each row's key and salt (R, 1), or (R, columns, ...) of all."""
    return _exponential(philox2x32(tokens, salt, key))


def _exponential(words: Tensor) -> Tensor:
    """Float32 Exp(1) values of words of 32 bits."""
    # -log1p(-u) keeps the small values, which decide the race, at full resolution; the half step keeps 0 out of u.
    return words.float().mul_(-(2.0**-32)).sub_(2.0**-33).log1p_().neg_()


def left_pads(attention_mask: Tensor) -> list[int]:
    """How many pads stand before each row of a left-padded batch. attention_mask: (B, T).

    >>> left_pads(torch.tensor([[0, 0, 1], [1, 1, 1]]))
    [2, 0]
    """
    mask = attention_mask != 0
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be of shape (B, T), got {tuple(mask.shape)}: add a batch dimension")
    for row, seen in enumerate(mask.tolist()):
        if seen != sorted(seen):
            raise ValueError(
                f"attention_mask must be left-padded, but row {row} has a 0 after a 1: pad with padding_side='left'"
            )
    return [int(pads) for pads in (~mask).sum(-1).tolist()]
