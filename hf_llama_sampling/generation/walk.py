"""Score many texts by a walk over their prefix tree: forward each edge once, pass its cache to the edges below.

The walk is depth first. Siblings of similar length are forwarded in one batch, right-padded, each with its parent's
cache; their own caches are kept while texts below need them. What this module does not do: it samples nothing, and does
not check its arguments.
"""

import inspect
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig

from ..checks import nonfinite
from .caches import bytes_per_column, drop_last, repeat_rows, take_row, window_of
from .model_info import device_of, forget_longer_texts, length_limit, vocab_size_of
from .prefix import Edge, Ids, Step, Text, grow, steps_below
from .probe import Probe
from .releases import CACHE_NAME, cache_in
from .scoring import columns_per_chunk, needs_one_chunk, nonfinite_rows, ranks, rows_per_piece, too_few_logits

CACHE_BYTES = 1 << 30  # for the caches that a walk holds
_FORWARD_TOKENS = 1024  # most tokens of one forward: enough to use the weights well
# Cost of one more forward, in tokens, since it reads all weights: share a prefix only if that saves more.
_FORWARD_COST = {"cpu": 32}
_FORWARD_COST_ELSEWHERE = 256


def forward_cost(device: torch.device) -> int:
    """Return the cost of one more forward, in tokens."""
    return _FORWARD_COST.get(device.type, _FORWARD_COST_ELSEWHERE)


class CacheFacts(NamedTuple):
    """Column size and sliding window of a model's cache that texts may share."""

    column_bytes: int  # of one column of one row
    window: int | None  # the shortest sliding window


# By model and dtype.
_FACTS: "weakref.WeakKeyDictionary[Any, dict[Any, CacheFacts]]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def score_texts(
    model: Any,
    generate: Callable[..., Any],
    texts: Sequence[Text],
    *,
    rows: Sequence[int],
    top: int,
    greedy: bool,
    chunk_bytes: int,
    cache_bytes: int,
    apart: bool = False,
) -> None:
    """Score the texts; read the results by `Text.logprobs()`, `top()`, `named_logprobs()` and `is_greedy()`.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model, which takes an `observer`.
        texts: the texts to score.
        rows: the row of each text in the caller's list, for errors.
        top: how many best tokens to record at each scored position.
        greedy: whether to record the most probable token at each.
        chunk_bytes: memory for the logits of one forward and the tensors computed from them.
        cache_bytes: memory for the caches.
        apart: whether to batch only texts with equal scored columns. A forward computes the union of its rows' columns,
            so False saves forwards and wastes logits.

    Raises:
        ValueError: a scored position has a logit that is nan or inf, or a text needs several chunks and the model
            cannot be forwarded in chunks.
    """
    longest = max((len(text.tokens) for text in texts), default=1) - 1
    limit = length_limit(model)
    by_length = limit is not None and longest > limit
    root = grow(texts, shared=not by_length)
    walk = _Walk(
        model,
        generate,
        top=top,
        greedy=greedy,
        chunk_bytes=chunk_bytes,
        cache_bytes=cache_bytes,
        by_length=by_length,
        apart=apart,
    )
    try:
        walk.run(root)
    except _NonFinite as found:
        pairs = zip(rows, texts, strict=True)
        row, text = next(pair for pair in pairs if pair[1].reads(found.edge, found.index))
        raise nonfinite(row, text.begin + found.edge.start + found.index + 1) from None


class _NonFinite(Exception):
    """Raised if a scored position has a logit that is nan or inf."""

    def __init__(self, edge: Edge, index: int) -> None:
        self.edge, self.index = edge, index


class _ColumnReader:
    """An observer of the forward that asks for the logits of some columns, and keeps them.

    Args:
        name: the model's, for errors.
        columns: (C,) which of the forward's columns; if C is 0, no logits are kept.
        width: number of columns in the forward.
    """

    def __init__(self, name: str, columns: Tensor, width: int) -> None:
        self.name, self.columns, self.width = name, columns, width
        self.logits: Tensor | None = None  # (B, C, V), on the last device of a model that is spread over several

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Forward, keep the columns' logits, and return the last ones to the loop."""
        count = len(self.columns)
        if count and "logits_to_keep" in kwargs:
            # Count from the end, since soft prompts precede a text's own columns.
            kwargs["logits_to_keep"] = self.columns - self.width if count < self.width else 0
        output = forward(*args, **kwargs)
        logits = output.logits
        if count:
            if logits.shape[1] < self.width and logits.shape[1] != count:
                raise ValueError(too_few_logits(self.name, logits.shape[1], self.width))
            own = logits[:, -self.width :]
            self.logits = own if own.shape[1] == count else own[:, self.columns.to(logits.device)]
        output.logits = logits[:, -1:]
        return output


def forward_columns(
    model: Any, generate: Callable[..., Any], ids: Tensor, cache: Any, columns: Tensor, *, use_cache: bool
) -> tuple[Tensor | None, Any]:
    """Prefill `ids`, and discard the one token that transformers' `generate` must make.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model, which takes an `observer`.
        ids: (B, T), the cached columns included.
        cache: the first columns' cache, or None.
        columns: (C,) columns whose logits to return, counted from the first one after the cache.
        use_cache: whether to return the cache.

    Returns:
        the logits (B, C, V), None if there are no columns, and the cache of all T columns.
    """
    held = 0 if cache is None else int(cache.get_seq_length())
    reader = _ColumnReader(type(model).__name__, columns, ids.shape[1] - held)
    config = GenerationConfig(do_sample=False, max_new_tokens=1, return_dict_in_generate=True, use_cache=use_cache)
    given = {} if cache is None else {CACHE_NAME: cache}
    mask = torch.ones_like(ids)
    output = generate(ids, attention_mask=mask, generation_config=config, observer=reader, **given)
    return reader.logits, cache_in(output) if use_cache else None


def cache_facts(model: Any, generate: Callable[..., Any]) -> CacheFacts | None:
    """Find out, once per model and dtype, the facts of its cache; None if texts may not share it."""
    if not Probe(model, generate).reads_in_chunks(1):
        return None
    known = _FACTS.setdefault(model, {})
    if model.dtype not in known:
        ids = torch.ones(1, 3, dtype=torch.long, device=device_of(model))
        _, cache = forward_columns(model, generate, ids, None, ids[0, :0], use_cache=True)
        known[model.dtype] = CacheFacts(bytes_per_column(cache), window_of(cache))
    return known[model.dtype]


@dataclass(eq=False)
class _CacheSize:
    """Counts the frames that share a batch's cache, to release its bytes with the last one."""

    size: int  # bytes
    frames: int


@dataclass(eq=False)
class _Frame:
    """An edge with its cache, and the batches of steps below it that are not forwarded yet."""

    edge: Edge
    before: Ids  # the tokens up to the edge's end
    cache: Any = None  # of these tokens, 1 row; None at the root
    cache_size: _CacheSize | None = None  # shared with the other rows of the batch
    batches: list[list[Step]] | None = None


class _Walk:
    """One walk: a stack of frames, and the bytes of their caches."""

    def __init__(
        self,
        model: Any,
        generate: Callable[..., Any],
        *,
        top: int,
        greedy: bool,
        chunk_bytes: int,
        cache_bytes: int,
        by_length: bool,
        apart: bool,
    ) -> None:
        self.model, self.generate, self.top, self.greedy = model, generate, top, greedy
        self.chunk_bytes, self.cache_bytes, self.by_length, self.apart = chunk_bytes, cache_bytes, by_length, apart
        self.rotary_grows = length_limit(model) is not None
        self.device = device_of(model)
        self.vocab_size = vocab_size_of(model)
        self.most_read = columns_per_chunk(1, self.vocab_size, chunk_bytes)  # columns of logits in one forward
        self.skips_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.most_tokens = max(_FORWARD_TOKENS, self.most_read) if self.skips_logits else self.most_read
        self.least = forward_cost(self.device)
        self.held = 0  # bytes
        self.facts: CacheFacts | None = None

    def run(self, root: Edge) -> None:
        """Forward every edge."""
        stack = [_Frame(root, root.tokens)]
        while stack:
            frame = stack[-1]
            if frame.batches is None:
                frame.batches = self.batches(frame)
            if not frame.batches:
                stack.pop()
                continue
            steps = frame.batches.pop()
            cache, cache_size = frame.cache, frame.cache_size
            if not frame.batches:
                stack.pop()
                frame.cache = None
            cache = None if cache is None else repeat_rows(cache, len(steps))
            cache = self.forward(frame.before, steps, cache)
            if not frame.batches:
                self.release(cache_size)
            if not steps[0].is_leaf:
                stack += self.frames(frame.before, steps, cache)
            del cache

    def frames(self, before: Ids, steps: list[Step], cache: Any) -> list[_Frame]:
        """Make a frame for each row of a batch, the heaviest first: the stack walks it last."""
        width = max(len(step.tokens) for step in steps)
        cache_size = _CacheSize(len(steps) * self.bytes_of(steps[0].start + width), len(steps))
        self.held += cache_size.size
        rows = sorted(range(len(steps)), key=lambda row: -steps[row].last.weight)
        return [
            _Frame(
                steps[row].last,
                np.concatenate([before, steps[row].tokens]),
                drop_last(take_row(cache, row), width - len(steps[row].tokens)),
                cache_size,
            )
            for row in rows
        ]

    def release(self, cache_size: _CacheSize | None) -> None:
        """Release a frame's share of a cache; the last frame that shares it frees its bytes."""
        if cache_size is not None:
            cache_size.frames -= 1
            if not cache_size.frames:
                self.held -= cache_size.size

    def bytes_of(self, columns: int) -> int:
        """Compute the bytes of one row's cache of `columns` columns."""
        return columns * (self.facts.column_bytes if self.facts else 0)

    def keeps(self, step: Step) -> bool:
        """Whether to keep a step's cache for the texts below it: if that saves more than a forward, and fits."""
        if self.by_length or len(step.tokens) * (len(step.last.children) - 1) < self.least:
            return False
        self.facts = cache_facts(self.model, self.generate)
        return self.facts is not None and self.held + self.bytes_of(step.end + step.last.longest) <= self.cache_bytes

    def batches(self, frame: _Frame) -> list[list[Step]]:
        """Batch the steps below a frame. `run` pops from the end: leaves come first, the heaviest step last."""
        steps = steps_below(frame.edge, self.keeps)
        room = self.cache_bytes - self.held
        inner = self.pack([step for step in steps if not step.is_leaf], room // 2, cropped=True)
        inner.sort(key=lambda batch: -max(step.last.weight for step in batch))
        return inner + self.pack([step for step in steps if step.is_leaf], room, cropped=False)

    def pack(self, steps: list[Step], room: int, *, cropped: bool) -> list[list[Step]]:
        """Batch steps of similar length, as many as fit the budgets, at least one.

        `cropped`: whether caches are cut to each step's length afterwards; not possible once a sliding window is full.
        """
        window = (self.facts.window if self.facts else None) or sys.maxsize
        packed: list[list[Step]] = []
        read = np.zeros(0, bool)  # columns of the last batch
        for step in sorted(steps, key=lambda step: -len(step.tokens)):
            batch = packed[-1] if packed else []
            rows, width = len(batch) + 1, len(read)
            # A forward that neither takes nor leaves a cache needs no cache memory.
            needs_cache = cropped or step.start > 0
            equal = self.by_length or (cropped and step.start + width >= window)
            columns = step.columns()
            if not self.skips_logits:
                columns[:] = True
            both = read | np.pad(columns, (0, max(0, width - len(columns)))) if batch else read
            fits = (
                batch
                and width - len(step.tokens) <= (0 if equal else self.least)  # padding costs less than a forward
                and not (self.apart and not np.array_equal(read[: len(columns)], columns))
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

    def forward(self, before: Ids, steps: list[Step], cache: Any) -> Any:
        """Forward a batch of steps from the cache of the tokens before them; return the longer cache, if needed."""
        if self.rotary_grows:
            forget_longer_texts(self.model)
        width = max(len(step.tokens) for step in steps)
        ids = np.zeros((len(steps), len(before) + width), np.int64)  # right-padded: no scored token sees a pad
        read = np.zeros((len(steps), width), bool)
        ids[:, : len(before)] = before
        for row, step in enumerate(steps):
            ids[row, len(before) : step.end] = step.tokens
            read[row, : len(step.tokens)] = step.columns()
        inputs = torch.as_tensor(ids, device=self.device)
        start = 0
        for end in self.chunks(read):
            if start and (self.by_length or not Probe(self.model, self.generate).reads_in_chunks(width)):
                raise ValueError(needs_one_chunk(self.model, len(steps), width))
            columns = np.flatnonzero(read[:, start:end].any(0))
            logits, cache = forward_columns(
                self.model,
                self.generate,
                inputs[:, : len(before) + end],
                cache,
                torch.as_tensor(columns, device=self.device),
                use_cache=cache is not None or end < width or not steps[0].is_leaf,
            )
            if logits is not None:
                self.reduce(steps, logits, read, start + columns)
            del logits
            start = end
        return cache

    def reduce(
        self, steps: list[Step], logits: Tensor, read: npt.NDArray[np.bool_], columns: npt.NDArray[np.intp]
    ) -> None:
        """Store the scores from logits (B, C, V) of these columns in the edges."""
        rows, at = read[:, columns].nonzero()  # (P,) each: the scored places
        place = np.full(read.shape, -1)
        place[rows, columns[at]] = np.arange(len(rows))
        # Targets: first the next token on each edge, then the tokens at which texts branch off it.
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
        ids = self.named_ids(steps, place, len(rows))
        chosen, norms, best, top_ids, top_logprobs, named, ranked, bad = self.summarize(
            flat, source, np.array(wanted), ids
        )
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
                if edge.ids:
                    for index, where in zip(here.nonzero()[0].tolist(), found.tolist(), strict=True):
                        scores = zip(named[where].tolist(), ranked[where].tolist(), strict=True)
                        edge.named[index] = dict(zip(edge.ids, scores, strict=False))
        for (where, edge, key), value in zip(parting, chosen[len(rows) :], strict=True):
            edge.at_branch[key] = float(value - norms[where])

    def named_ids(self, steps: list[Step], place: npt.NDArray[np.intp], places: int) -> npt.NDArray[np.int64]:
        """(P, n): the ids to score at each place, shorter lists padded with 0."""
        count = max(len(edge.ids) for step in steps for edge, _ in step.edges)
        ids = np.zeros((places, count), np.int64)
        for row, step in enumerate(steps):
            for edge, begin in step.edges:
                found = place[row, begin : begin + len(edge.tokens)]
                ids[found[found >= 0], : len(edge.ids)] = edge.ids
        return ids

    def summarize(
        self, flat: Tensor, source: Tensor, wanted: npt.NDArray[np.int64], named: npt.NDArray[np.int64]
    ) -> tuple[Any, ...]:
        """Reduce the logits of P places to their scores, piece by piece.

        Args:
            flat: (N, V) logits.
            source: (P,) each place's row in `flat`.
            wanted: (Q, 2) pairs of place and token.
            named: (P, n) ids to score at each place.

        Returns:
            NumPy arrays: the wanted pairs' logits (Q,), the log normalizers (P,), the greedy tokens (P,), the `top`
            best ids (P, k) and their logprobs (P, k), the named ids' logprobs (P, n) and ranks (P, n), and whether a
            place has a logit that is nan or inf (P,).
        """
        pairs = torch.as_tensor(wanted, device=flat.device)
        chosen = flat[source[pairs[:, 0]], pairs[:, 1]].float()
        norms, best, top_ids, top_logprobs, of_named, ranked, bad = [], [], [], [], [], [], []
        size = rows_per_piece(self.vocab_size, self.chunk_bytes)
        ids_of = torch.split(torch.as_tensor(named, device=flat.device), size)
        for piece, own in zip(torch.split(source, size), ids_of, strict=True):
            some = flat[piece].float()
            norm = torch.logsumexp(some, dim=-1)
            values, ids = some.topk(self.top, dim=-1) if self.top else (some[:, :0], piece[:, None][:, :0])
            norms.append(norm)
            best.append(some.argmax(-1) if self.greedy else piece)
            top_ids.append(ids)
            top_logprobs.append(values - norm[:, None])
            of_named.append(some.gather(-1, own) - norm[:, None])
            ranked.append(ranks(some, own))
            bad.append(nonfinite_rows(some))
        found = (chosen, *(torch.cat(parts) for parts in (norms, best, top_ids, top_logprobs, of_named, ranked, bad)))
        return tuple(part.cpu().numpy() for part in found)

    def chunks(self, read: npt.NDArray[np.bool_]) -> list[int]:
        """Compute the columns at which chunks end, so that each chunk's tokens and logits fit."""
        rows, width = read.shape
        columns = np.asarray(read.any(0)) if self.skips_logits else np.ones(width, bool)
        ends, start = [], 0
        while start < width:
            most = max(1, self.most_tokens // rows)
            kept = rows * columns[start : start + most].cumsum()
            start += max(1, int((kept <= self.most_read).sum()))
            ends.append(start)
        return ends
