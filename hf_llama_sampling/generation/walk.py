"""Scores of many texts by a walk over their tree: each edge is forwarded once, caches are handed down.

The walk goes depth first. Siblings of similar length are forwarded in one batch, right-padded, each with its parent's
cache; their own caches are kept as long as texts below need them. What this module does not do: it samples nothing, and
does not check what callers give.
"""

import inspect
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import nonfinite
from .caches import bytes_per_column, can_be_shared, drop_last, repeat_rows, take_row, window_of
from .model_info import device_of, length_limit, vocab_size_of
from .prefix import Edge, Ids, Step, Text, grow, steps_below
from .scoring import RowScores, bytes_for, columns_per_chunk, nonfinite_rows

CACHE_BYTES = 1 << 30  # for the caches that a walk holds
_FORWARD_TOKENS = 1024  # most tokens of one forward: enough for all its weights to be used well
# What one more forward costs, in tokens: it reads all weights. A shared run that saves fewer is not worth it.
_FORWARD_COST = {"cpu": 32}
_FORWARD_COST_ELSEWHERE = 256
_PIECES = 16


class CacheFacts(NamedTuple):
    """How a model's cache of a prefix may be shared."""

    column_bytes: int  # of one column of one row
    window: int | None  # the shortest sliding window


# By model, and by whether it is in training mode and its dtype; None where its caches are not shared.
_FACTS: "weakref.WeakKeyDictionary[Any, dict[Any, CacheFacts | None]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def score_texts(
    model: Any,
    texts: Sequence[Text],
    *,
    rows: Sequence[int],
    top: int,
    greedy: bool,
    chunk_bytes: int,
    cache_bytes: int,
) -> None:
    """Compute what the texts' methods then answer: logprobs, best tokens, whether a token is the greedy one.

    Args:
        rows: the row of each text in the caller's list, for errors.
        top: how many best tokens to note at each position that is read.
        greedy: whether to note the most probable token at each.
        chunk_bytes: memory for the logits of one forward, and what is made of them.
        cache_bytes: memory for the caches that are held.

    Raises:
        ValueError: a logit that is read is nan or inf, or a text needs several chunks and the model's cache has more
            than keys and values.
    """
    longest = max(len(text.tokens) for text in texts) - 1
    limit = length_limit(model)
    by_length = limit is not None and longest > limit
    root = grow(texts, shared=not by_length)
    walk = _Walk(model, top=top, greedy=greedy, chunk_bytes=chunk_bytes, cache_bytes=cache_bytes, by_length=by_length)
    try:
        walk.run(root)
    except _NonFinite as found:
        row = next(row for row, text in zip(rows, texts, strict=True) if text.reads(found.edge, found.index))
        raise nonfinite(row, found.edge.start + found.index + 1) from None


def score_rows(
    model: Any, prompts: list[list[int]], *, top: int, chunk_bytes: int, cache_bytes: int
) -> list[RowScores]:
    """Scores of whole texts, 0.0 and no best tokens for each one's first token."""
    texts = [Text(np.array(prompt, np.int32), 1) for prompt in prompts]
    score_texts(
        model, texts, rows=range(len(texts)), top=top, greedy=False, chunk_bytes=chunk_bytes, cache_bytes=cache_bytes
    )
    return [RowScores([0.0, *text.logprobs()], [[], *text.top()] if top else []) for text in texts]


class _NonFinite(Exception):
    """A logit that is read is nan or inf."""

    def __init__(self, edge: Edge, index: int) -> None:
        self.edge, self.index = edge, index


def try_sharing(model: Any, tokens: Ids, device: torch.device) -> CacheFacts | None:
    """Forward a few tokens whole, then in parts: two rows go on after the cache of the first three tokens.

    None if the cache is of a kind that is not shared, or the logits differ: such a model is forwarded text by text.
    """
    ids = torch.as_tensor(tokens, device=device)[None].long()
    try:
        cache = getattr(model(ids[:, :3], use_cache=True, return_dict=True), "past_key_values", None)
        if not can_be_shared(cache):
            return None
        whole = model(ids, use_cache=False, return_dict=True).logits[0, 3:].float()
        two = repeat_rows(cache, 2)
        parts = model(ids[:, 3:].expand(2, -1), past_key_values=two, use_cache=True, return_dict=True).logits
    except Exception:  # no such argument, no such shape: whatever is wrong, texts are forwarded whole
        return None
    # Rounding, at the size of the logits. A cache that is not continued is off by far more.
    allowed = min(0.1, 1000 * torch.finfo(parts.dtype).eps) * whole.abs().max()
    if not bool((parts.float() - whole).abs().max() <= allowed):
        return None
    return CacheFacts(bytes_per_column(cache), window_of(cache))


@dataclass(eq=False)
class _Store:
    """The cache of a batch, whose rows several frames hold."""

    size: int  # bytes
    users: int


@dataclass(eq=False)
class _Frame:
    """An edge whose cache is held, and the batches of steps below it that are still to be forwarded."""

    edge: Edge
    cache: Any = None  # 1 row; None at the root
    store: _Store | None = None
    batches: list[list[Step]] | None = None


class _Walk:
    """One walk: a stack of frames, and what their caches take."""

    def __init__(
        self, model: Any, *, top: int, greedy: bool, chunk_bytes: int, cache_bytes: int, by_length: bool
    ) -> None:
        self.model, self.top, self.greedy = model, top, greedy
        self.chunk_bytes, self.cache_bytes, self.by_length = chunk_bytes, cache_bytes, by_length
        self.device = device_of(model)
        self.vocab_size = vocab_size_of(model)
        self.most_read = columns_per_chunk(1, self.vocab_size, chunk_bytes)  # columns of logits in one forward
        self.skips_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.most_tokens = max(_FORWARD_TOKENS, self.most_read) if self.skips_logits else self.most_read
        self.least = _FORWARD_COST.get(self.device.type, _FORWARD_COST_ELSEWHERE)
        self.held = 0  # bytes
        self.facts: CacheFacts | None = None

    def run(self, root: Edge) -> None:
        """Forward every edge."""
        stack = [_Frame(root)]
        while stack:
            frame = stack[-1]
            if frame.batches is None:
                frame.batches = self.batches(frame)
            if not frame.batches:
                stack.pop()
                continue
            steps = frame.batches.pop()
            cache, store = frame.cache, frame.store
            if not frame.batches:
                stack.pop()
                frame.cache = None
            cache = None if cache is None else repeat_rows(cache, len(steps))
            cache = self.forward(steps, cache)
            if not frame.batches:
                self.release(store)
            if not steps[0].is_leaf:
                stack += self.frames(steps, cache)
            del cache

    def frames(self, steps: list[Step], cache: Any) -> list[_Frame]:
        """A frame for each row of a batch; the heaviest is walked last."""
        width = max(len(step.tokens) for step in steps)
        store = _Store(len(steps) * self.bytes_of(steps[0].start + width), len(steps))
        self.held += store.size
        rows = sorted(range(len(steps)), key=lambda row: -steps[row].last.weight)
        return [
            _Frame(steps[row].last, drop_last(take_row(cache, row), width - len(steps[row].tokens)), store)
            for row in rows
        ]

    def release(self, store: _Store | None) -> None:
        """Count a frame's cache as given back, with the last frame that shares its store."""
        if store is not None:
            store.users -= 1
            if not store.users:
                self.held -= store.size

    def bytes_of(self, columns: int) -> int:
        """Of a row's cache of so many columns."""
        return columns * (self.facts.column_bytes if self.facts else 0)

    def keeps(self, step: Step) -> bool:
        """Whether a step's cache is kept for the texts below it: if that saves more than it costs, and fits."""
        if len(step.tokens) * (len(step.last.children) - 1) < self.least or not self.can_share(step.tokens):
            return False
        return self.held + self.bytes_of(step.end + step.last.longest) <= self.cache_bytes

    def can_share(self, tokens: Ids) -> bool:
        """Whether this model's caches of a prefix may be shared; tried once per model, on these tokens."""
        if self.by_length:
            return False
        if self.facts is None:
            known = _FACTS.setdefault(self.model, {})
            mode = (self.model.training, self.model.dtype)
            if mode not in known:
                known[mode] = try_sharing(self.model, np.resize(tokens, 8), self.device)
            self.facts = known[mode]
        return self.facts is not None

    def batches(self, frame: _Frame) -> list[list[Step]]:
        """The steps below a frame in batches, to be taken from the end: leaves first, the heaviest step last."""
        steps = steps_below(frame.edge, self.keeps)
        room = self.cache_bytes - self.held
        inner = self.pack([step for step in steps if not step.is_leaf], room // 2, cropped=True)
        inner.sort(key=lambda batch: -max(step.last.weight for step in batch))
        return inner + self.pack([step for step in steps if step.is_leaf], room, cropped=False)

    def pack(self, steps: list[Step], room: int, *, cropped: bool) -> list[list[Step]]:
        """Steps of similar length together, as many as fit the budgets, one at least.

        `cropped`: their caches will be cut to each one's length, which a sliding window that is full does not allow.
        """
        window = (self.facts.window if self.facts else None) or sys.maxsize
        packed: list[list[Step]] = []
        read = np.zeros(0, bool)  # columns of the last batch
        for step in sorted(steps, key=lambda step: -len(step.tokens)):
            batch = packed[-1] if packed else []
            rows, width = len(batch) + 1, len(read)
            # A forward without a cache before or after it takes none of the room.
            needs_cache = cropped or step.start > 0
            equal = self.by_length or (cropped and step.start + width >= window)
            columns = step.columns()
            if not self.skips_logits:
                columns[:] = True
            both = read | np.pad(columns, (0, max(0, width - len(columns)))) if batch else read
            fits = (
                batch
                and width - len(step.tokens) <= (0 if equal else self.least)  # padding costs less than a forward
                and rows * width <= self.most_tokens
                and rows * int(both.sum()) <= self.most_read
                and (not needs_cache or rows * self.bytes_of(step.start + width) <= room)
            )
            if fits:
                batch.append(step)
                read = both
            else:
                packed.append([step])
                read = columns
        return packed

    def forward(self, steps: list[Step], cache: Any) -> Any:
        """Forward a batch of steps after the cache of what is before them; the cache of all of it, if it is needed."""
        width = max(len(step.tokens) for step in steps)
        ids = np.zeros((len(steps), width), np.int64)  # a pad stands behind all that is read
        read = np.zeros((len(steps), width), bool)
        for row, step in enumerate(steps):
            ids[row, : len(step.tokens)] = step.tokens
            read[row, : len(step.tokens)] = step.columns()
        inputs = torch.as_tensor(ids, device=self.device)
        start = 0
        for end in self.chunks(read):
            if start and (self.by_length or not can_be_shared(cache)):
                needed = bytes_for(len(steps), self.vocab_size, width)
                raise ValueError(
                    f"scoring a text chunk by chunk needs a cache of keys and values alone, and "
                    f"{type(self.model).__name__} has none: raise chunk_bytes, here to {needed}, so that one chunk "
                    "holds it all"
                )
            columns = np.flatnonzero(read[:, start:end].any(0))
            where = torch.as_tensor(columns, device=self.device)
            skip: dict[str, Any] = {}
            if self.skips_logits and len(columns) < end - start:
                skip["logits_to_keep"] = where if len(columns) else 1
            use_cache = cache is not None or end < width or not steps[0].is_leaf
            output = self.model(
                inputs[:, start:end], past_key_values=cache, use_cache=use_cache, return_dict=True, **skip
            )
            logits = output.logits  # on the last device of a model that is spread over several
            if logits.shape[1] > len(columns) > 0:
                logits = logits[:, where.to(logits.device)]
            if len(columns):
                self.reduce(steps, logits, read, start + columns)
            cache = getattr(output, "past_key_values", None) if use_cache else None
            del output, logits
            start = end
        return cache

    def reduce(
        self, steps: list[Step], logits: Tensor, read: npt.NDArray[np.bool_], columns: npt.NDArray[np.intp]
    ) -> None:
        """Note in the edges what is read of the logits (B, C, V) at these columns."""
        rows, at = read[:, columns].nonzero()  # (P,) each: the places that are read
        place = np.full(read.shape, -1)
        place[rows, columns[at]] = np.arange(len(rows))
        # Targets are each edge's own next tokens, then those at which texts part from it.
        targets = np.zeros(len(rows), np.int64)
        parting: list[tuple[int, Edge, tuple[int, int]]] = []
        for row, step in enumerate(steps):
            for edge, begin in step.edges:
                places = place[row, begin : begin + len(edge.tokens)]
                own = (places[:-1] >= 0) & edge.read[:-1]
                targets[places[:-1][own]] = edge.tokens[1:][own]
                parting += [(places[key[0]], edge, key) for key in edge.at_branch if places[key[0]] >= 0]
        wanted = [*enumerate(targets), *((where, key[1]) for where, _, key in parting)]
        flat = logits.flatten(0, 1)  # (B * C, V)
        source = torch.as_tensor(rows * len(columns) + at, device=flat.device)
        chosen, norms, best, top_ids, top_logprobs, bad = self.summarize(flat, source, np.array(wanted))
        for row, step in enumerate(steps):
            for edge, begin in step.edges:
                places = place[row, begin : begin + len(edge.tokens)]
                here = (places >= 0) & edge.read
                found = places[here]
                if bad[found].any():
                    raise _NonFinite(edge, int(here.nonzero()[0][bad[found]][0]))
                if not len(edge.logprobs):
                    edge.logprobs = np.zeros(len(edge.tokens), np.float32)
                    edge.greedy = np.full(len(edge.tokens), -1)
                edge.logprobs[here] = chosen[found] - norms[found]
                if self.greedy:
                    edge.greedy[here] = best[found]
                if self.top:
                    for index, where in zip(here.nonzero()[0].tolist(), found.tolist(), strict=True):
                        edge.top[index] = list(zip(top_ids[where].tolist(), top_logprobs[where].tolist(), strict=True))
        for (where, edge, key), value in zip(parting, chosen[len(rows) :], strict=True):
            edge.at_branch[key] = float(value - norms[where])

    def summarize(self, flat: Tensor, source: Tensor, wanted: npt.NDArray[np.int64]) -> tuple[Any, ...]:
        """Of the rows `source` (P,) of logits (N, V): the logits of the `wanted` pairs of place and token (Q, 2), the
        logs of the normalizers (P,), the best tokens (P,), the `top` best with logprobs (P, k), whether one is nan or
        inf (P,). All as NumPy arrays, float32."""
        pairs = torch.as_tensor(wanted, device=flat.device)
        chosen = flat[source[pairs[:, 0]], pairs[:, 1]].float()
        norms, best, top_ids, top_logprobs, bad = [], [], [], [], []
        for piece in torch.split(source, max(1, self.chunk_bytes // (4 * _PIECES * self.vocab_size))):
            some = flat[piece].float()
            norm = torch.logsumexp(some, dim=-1)
            values, ids = some.topk(self.top, dim=-1) if self.top else (some[:, :0], piece[:, None][:, :0])
            norms.append(norm)
            best.append(some.argmax(-1) if self.greedy else piece)
            top_ids.append(ids)
            top_logprobs.append(values - norm[:, None])
            bad.append(nonfinite_rows(some))
        found = (chosen, *(torch.cat(parts) for parts in (norms, best, top_ids, top_logprobs, bad)))
        return tuple(part.cpu().numpy() for part in found)

    def chunks(self, read: npt.NDArray[np.bool_]) -> list[int]:
        """The columns at which a batch is cut, so that each part's tokens and logits fit."""
        rows, width = read.shape
        columns = np.asarray(read.any(0)) if self.skips_logits else np.ones(width, bool)
        ends, start = [], 0
        while start < width:
            most = max(1, self.most_tokens // rows)
            kept = rows * columns[start : start + most].cumsum()
            start += max(1, int((kept <= self.most_read).sum()))
            ends.append(start)
        return ends
