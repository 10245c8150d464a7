"""Keep the keys and values of a call's texts, so that the next turn of a conversation prefills only new tokens.

A prompt that shares a prefix with a kept text takes the prefix's keys and values, and is prefilled from the first token
that differs. What this module does not do: it lays out no batch and forwards no prompt; `sharing` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import check_int
from .caches import LayerStates, can_be_shared, can_drop, row_states
from .model_info import device_of
from .model_state import ModelState, trains
from .releases import CACHE_NAMES
from .walk import CACHE_BYTES, forward_columns

_CHECKED = 4  # tokens to forward again, to check that the model still computes the same keys and values
_WORTH = 2 * _CHECKED  # do not take a prefix that saves fewer tokens


@dataclass(eq=False)
class ReadText:
    """A text, and the keys and values that the model computed for it."""

    ids: npt.NDArray[np.int64]  # (T,)
    states: LayerStates  # of these T columns

    def common(self, prompt: Sequence[int]) -> int:
        """Return the length of the prefix that a prompt shares with this text."""
        length = min(len(self.ids), len(prompt))
        differs = np.flatnonzero(self.ids[:length] != np.asarray(prompt[:length]))
        return int(differs[0]) if len(differs) else length


class Beginning(NamedTuple):
    """A kept text, and the length of the prefix that a prompt shares with it."""

    text: ReadText
    length: int


@dataclass(eq=False)
class ReadTexts:
    """The texts of one run: those that earlier calls have prefilled, and its own."""

    earlier: list[ReadText] = field(default_factory=list)
    read: list[ReadText] = field(default_factory=list)

    def take(self, prompts: Sequence[Sequence[int]]) -> list[Beginning]:
        """Find the longest known prefix of each prompt. Drop all other texts, before the run needs memory."""
        earlier, self.earlier = self.earlier, []
        if not earlier:
            return []
        return [
            max((Beginning(text, text.common(prompt)) for text in earlier), key=lambda found: found.length)
            for prompt in prompts
        ]

    def add(self, cache: Any, sequences: Tensor, spans: Sequence[slice]) -> None:
        """Store each row's keys and values after a run: `spans` are its columns in sequences (B, T)."""
        if not can_be_shared(cache) or not can_drop(cache):
            return
        held = int(cache.get_seq_length())
        for row, (tokens, span) in enumerate(zip(sequences.tolist(), spans, strict=True)):
            span = slice(span.start, min(span.stop, held))
            self.read.append(ReadText(np.array(tokens[span], np.int64), row_states(cache, row, span)))


class PromptCache:
    """Keys and values of the texts that the last call read, for a next call whose prompts begin as these texts do.

    Pass the same object to each call of a conversation. A turn then costs what is new in it, and its answer is the one
    from scratch up to the rounding of the logits. A prompt that differs from the kept text is read from the first token
    that differs. Everything is read anew where the model, its weights, adapters, hooks or settings, its dtype or device
    have changed, where the model trains, and where its cache cannot be cut (a sliding window that is full, a recurrent
    state). A call that fails keeps nothing. Calls of several threads do not disturb one another; what the last one read
    is kept.

    Args:
        max_bytes: most memory for what is kept between calls, 1 GiB if not given. The cache of a call with a single
            prompt is always kept.

    >>> cache = PromptCache()
    >>> first = model.generate([[1, 5, 6, 7]], max_gen_len=2, temperature=0, prompt_cache=cache)
    >>> len(cache), cache.nbytes > 0
    (1, True)
    """

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = check_int("max_bytes", max_bytes, least=0)
        self._kept: _Kept | None = None

    def __len__(self) -> int:
        """How many texts are kept."""
        return 0 if self._kept is None else len(self._kept.texts)

    @property
    def nbytes(self) -> int:
        """The memory of what is kept."""
        kept = self._kept
        return 0 if kept is None else _bytes_of(kept.texts)

    def clear(self) -> None:
        """Let go of everything."""
        self._kept = None

    def __reduce__(self) -> Any:
        return PromptCache, (self.max_bytes,)  # a copy starts empty

    def take_out(self, model: Any) -> list[ReadText]:
        """Empty the cache; return its texts if this model, with its present weights, has read them, else none."""
        kept, self._kept = self._kept, None
        return list(kept.texts) if kept is not None and kept.made_by(model) else []

    def keep(self, model: Any, texts: list[ReadText]) -> None:
        """Keep what a call has read, if it is one text or fits."""
        if texts and not trains(model) and (len(texts) == 1 or _bytes_of(texts) <= self.max_bytes):
            self._kept = _Kept(texts, ModelState(model), [_embedded(model, text) for text in texts])


def check_prompt_cache(value: Any, model_kwargs: Mapping[str, Any]) -> PromptCache | None:
    """Refuse anything but a `PromptCache`, and one beside a cache of transformers."""
    if value is None:
        return None
    if not isinstance(value, PromptCache):
        raise TypeError(
            f"prompt_cache must be a PromptCache, got {type(value).__name__}: make one with PromptCache(), or pass a "
            "cache of transformers as past_key_values"
        )
    for name in CACHE_NAMES:
        if model_kwargs.get(name) is not None:
            raise ValueError(f"{name} and prompt_cache both say what has been read: pass one of them")
    return value


class _Kept(NamedTuple):
    texts: list[ReadText]
    state: ModelState
    embedded: list[Tensor | None]  # see `_embedded`, of each text

    def made_by(self, model: Any) -> bool:
        """Whether a model is in the state in which it computed the texts, and embeds their tokens as it did."""
        return (
            not trains(model)
            and self.state.holds_for(model)
            and all(map(_equal_sums, self.embedded, (_embedded(model, text) for text in self.texts)))
        )


def _embedded(model: Any, text: ReadText) -> Tensor | None:
    """(2, T): two sums over each token's embedding, since single rows are often set through `.data`; None if unknown.

    torch does not count changes through `.data`, and the check of the first keys sees no other token's.
    """
    table = getattr(_input_embeddings(model), "weight", None)
    if type(table) is not torch.nn.Parameter or table.device.type == "meta":  # quantized, distributed or offloaded
        return None
    rows = table.detach()[torch.as_tensor(text.ids, device=table.device)].float()  # (T, size)
    return torch.stack([rows.sum(-1), rows @ torch.arange(1.0, rows.shape[1] + 1, device=rows.device)])


def _input_embeddings(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _equal_sums(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


def _bytes_of(texts: Sequence[ReadText]) -> int:
    states = [states for text in texts for states in text.states if states is not None]
    return sum(tensor.numel() * tensor.element_size() for pair in states for tensor in pair)


def worth_taking(columns: int, rows: int) -> bool:
    """Whether so many known columns, in so many rows, save more than the check costs."""
    return columns > 0 and columns * rows >= _WORTH


def still_reads_alike(model: Any, generate: Callable[..., Any], text: ReadText) -> bool:
    """Check that the model still computes the kept keys and values of a text's first tokens.

    torch does not count every change: weights through `.data`, adapters, hooks, the config.
    """
    ids = torch.as_tensor(text.ids[None, :_CHECKED], device=device_of(model))
    _, cache = forward_columns(model, generate, ids, None, ids[0, :0], use_cache=True)
    if not can_be_shared(cache):
        return False
    found = row_states(cache, 0, slice(None))
    return len(found) == len(text.states) and all(map(_equal, found, text.states))


def _equal(new: tuple[Tensor, Tensor] | None, old: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the first keys and values are unchanged, up to the rounding of a forward of another shape."""
    if new is None or old is None:
        return new is old
    return all(_close(one, other[..., : one.shape[-2], :]) for one, other in zip(new, old, strict=True))


def _close(new: Tensor, old: Tensor) -> bool:
    if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return False
    allowed = min(0.1, 200 * torch.finfo(new.dtype).eps) * old.abs().max()
    return bool((new - old).abs().max() <= allowed)
