"""`Llama.model`: a transformers model that also has the interface of the reference's ``Transformer``.

``model.forward(tokens, start_pos)`` with its cache by position, ``model.params``, and ``layers``, ``tok_embeddings``,
``norm`` and ``output`` for hooks (facebookresearch/llama, llama/model.py). Everything else is the transformers model's
own. What this module does not do: it changes nothing on the model that it is given.
"""

import functools
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checks import check_int
from ..generation.adapters import is_peft_model
from ..generation.caches import can_be_shared, can_drop, drop_last, select_rows
from ..generation.mixin import with_llama_generation
from ..generation.model_info import device_of, vocab_size_of
from ..generation.probe import goes_on_from_a_cache
from ..generation.releases import CACHE_NAME, cache_in
from ..generation.turns import turns_of
from ..generation.view import twin_of

_IN_DECODER = {"layers": "layers", "tok_embeddings": "embed_tokens", "norm": "norm"}
_FROM_PARAMS = ("n_layers",)


class _Read(NamedTuple):
    """Texts and cache of earlier calls of `forward(tokens, start_pos)`."""

    ids: Tensor  # (B, T), the texts
    cache: Any  # the model's cache of these texts; used only if it gives the logits of the whole text


class _Answer(NamedTuple):
    """Output of a forward."""

    logits: Tensor  # (B, T, V)
    cache: Any


def with_reference_interface(model: PreTrainedModel, params: SimpleNamespace) -> Any:
    """Make a separate model that shares its weights with `model` and has the members of the reference's.

    >>> handle = with_reference_interface(model, SimpleNamespace(max_seq_len=64))
    >>> handle.forward(torch.tensor([[1, 870]]), 0).shape, handle.forward(torch.tensor([[988]]), 2).shape
    (torch.Size([1, 2, 1024]), torch.Size([1, 1, 1024]))
    """
    handle: Any = twin_of(with_llama_generation(model))
    handle = _as_reference(handle)
    handle.params = params
    handle.max_seq_len = params.max_seq_len  # the limit of generate, score_tokens and forward
    handle._read, handle._goes_on = None, {}
    return handle


class ReferenceModel:
    """The reference's interface, which `with_reference_interface` mixes into a model class."""

    params: SimpleNamespace
    _read: _Read | None
    _goes_on: dict[bool, bool]  # for single tokens (True) and for several: whether a cache gave the logits of the whole

    @property
    def forward(self) -> Callable[..., Any]:
        """Call the model's own forward; with a `start_pos`, the reference's `forward(tokens, start_pos)`.

        It answers tokens (B, T) that stand at `start_pos`, `start_pos + 1`, ... of each row with float32 logits
        (B, T, V). A `start_pos` of 0 starts new texts, the end of the last call goes on, anything between goes back.

        Raises:
            ValueError: tokens that the model cannot embed, or a `start_pos` beyond what was read so far.
        """
        inner = self.__dict__.get("forward") or super().forward  # type: ignore[misc]

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = _reference_call(args, kwargs)
            if call is None:
                return inner(*args, **kwargs)
            with turns_of(self).beside_others():
                return self._forward_at(inner, *call)

        return forward

    @forward.setter
    def forward(self, value: Callable[..., Any]) -> None:
        self.__dict__["forward"] = value

    @forward.deleter
    def forward(self) -> None:
        del self.__dict__["forward"]

    @torch.no_grad()
    def _forward_at(self, forward: Callable[..., Any], tokens: Any, start_pos: Any) -> Tensor:
        """Compute logits (B, T, V) of tokens (B, T) at `start_pos`, from earlier calls' cache if that is reliable."""
        start = check_int("start_pos", start_pos, least=0)
        new = self._check_tokens(tokens, start)
        earlier, self._read = self._read, None  # a call that fails keeps nothing
        ids = torch.cat([_texts_before(earlier, len(new), start), new], 1) if start else new
        single = new.shape[1] == 1
        by_cache = None
        if earlier is not None and start and self._goes_on.get(single, True):
            by_cache = _go_on(forward, earlier, new, start) if goes_on_from_a_cache(self, ids.shape[1]) else None
        if by_cache is None or single not in self._goes_on:
            answer = _whole(forward, ids)
            if by_cache is not None:  # the first time, check that the cache gives the logits of the whole text
                self._goes_on[single] = _equal(by_cache.logits, answer.logits[:, start:], self.dtype)
        if by_cache is not None and self._goes_on[single]:
            answer = by_cache
        self._read = _Read(ids, answer.cache)
        return answer.logits[:, -new.shape[1] :].float()

    def _check_tokens(self, tokens: Any, start: int) -> Tensor:
        """Convert token ids (B, T) to a tensor on the model's device."""
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"forward(tokens, start_pos) takes token ids of shape (B, T), got {type(tokens).__name__}"
            ) from None
        if ids.dim() != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"forward(tokens, start_pos) takes token ids of shape (B, T), got {ids.dtype} of shape "
                f"{tuple(ids.shape)}: a single text is tokens[None]"
            )
        size, most = vocab_size_of(self), self.params.max_seq_len
        beyond = ids[(ids < 0) | (ids >= size)]
        if len(beyond):
            raise ValueError(f"token ids must lie in [0, {size}), got {int(beyond[0])}: cut or replace it")
        if start + ids.shape[1] > most:
            raise ValueError(
                f"a text must fit max_seq_len={most}, got {ids.shape[1]} tokens from start_pos={start}: shorten it, or "
                "raise max_seq_len"
            )
        return ids.long().to(device_of(self))

    def __getattr__(self, name: str) -> Any:
        if name in _FROM_PARAMS:
            return getattr(self.params, name)
        if name not in (*_IN_DECODER, "output", "freqs_cis"):
            return super().__getattr__(name)  # type: ignore[misc]
        found = None
        if name == "output":
            found = self.get_output_embeddings()
        elif name in _IN_DECODER:
            whole = self.get_base_model() if is_peft_model(self) else self
            decoder = getattr(whole, whole.base_model_prefix, None)
            found = getattr(decoder, _IN_DECODER[name], None)
        if found is None:
            raise AttributeError(
                f"{type(self).__name__} has no {name} as the reference's model has: hook a module of "
                "model.named_modules()"
            )
        return found

    def __reduce__(self) -> Any:
        # A class made at run time cannot be pickled by name, so unpickling makes it again from its base class.
        base: Any = type(self).__mro__[2]
        return _as_reference, (base.__new__(base),), self.__dict__


@functools.cache
def _reference_class(model_class: Any) -> Any:
    """Mix the interface into a class, under the same name, which `save_pretrained` writes into the config."""
    if issubclass(model_class, ReferenceModel):
        return model_class
    return type(model_class.__name__, (ReferenceModel, model_class), {"__module__": __name__})


def _as_reference(blank: Any) -> Any:
    model_class: Any = type(blank)
    blank.__class__ = _reference_class(model_class)
    return blank


def _reference_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return tokens and position of a call in the reference's form; None for transformers' form."""
    given = dict(kwargs)
    if len(args) == 2 and _is_position(args[1]) and not kwargs:
        return args[0], args[1]
    if not {"start_pos", "tokens"} & set(kwargs):
        return None
    if args:
        given["tokens"] = args[0]
    elif "input_ids" in given:
        given["tokens"] = given.pop("input_ids")
    if len(args) > 1 or set(given) != {"tokens", "start_pos"}:
        raise TypeError(
            "the reference's forward takes tokens and start_pos alone: call forward(tokens, start_pos), or "
            "transformers' forward(input_ids=..., past_key_values=...) without start_pos"
        )
    return given["tokens"], given["start_pos"]


def _is_position(value: Any) -> bool:
    """Whether a second positional argument is a position, not transformers' attention mask."""
    return not (value is None or isinstance(value, Mapping) or getattr(value, "ndim", False))


def _whole(forward: Callable[..., Any], ids: Tensor) -> _Answer:
    """Compute the logits of whole texts (B, T); return also the model's cache of them, if it makes one."""
    try:
        output = forward(input_ids=ids, use_cache=True, return_dict=True)
    except ValueError:  # a recurrent model that makes no cache by itself
        output = forward(input_ids=ids, use_cache=False, return_dict=True)
    return _Answer(output.logits, cache_in(output))


def _go_on(forward: Callable[..., Any], earlier: _Read, new: Tensor, start: int) -> _Answer | None:
    """Compute the logits of new tokens (B, T) from the cache of earlier ones; None if the model cannot use it."""
    cache, length = earlier.cache, earlier.ids.shape[1]
    if not can_be_shared(cache) or int(cache.get_seq_length()) != length or (start < length and not can_drop(cache)):
        return None
    if start < length or len(new) < len(earlier.ids):
        cache = select_rows(drop_last(cache, length - start), torch.arange(len(new)))
    try:
        output = forward(input_ids=new, **{CACHE_NAME: cache}, use_cache=True, return_dict=True)
    except (AssertionError, NotImplementedError, TypeError, ValueError):  # it takes no cache, or only single tokens
        return None
    kept = cache_in(output)
    if kept is None or not hasattr(kept, "get_seq_length") or int(kept.get_seq_length()) != start + new.shape[1]:
        return None
    return _Answer(output.logits, kept)


def _texts_before(earlier: _Read | None, rows: int, start: int) -> Tensor:
    """Return the texts (B, start) that the new tokens of so many rows continue."""
    length = 0 if earlier is None else earlier.ids.shape[1]
    if earlier is None or start > length:
        raise ValueError(
            f"start_pos must not lie beyond the tokens that were read, got {start} after {length}: give the tokens "
            "from there, or the whole text with start_pos=0"
        )
    if rows > len(earlier.ids):
        raise ValueError(
            f"a text must be begun with start_pos=0, but {rows} go on at start_pos={start} where {len(earlier.ids)} "
            "were begun: start again with all of them"
        )
    return earlier.ids[:rows, :start]


def _equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal up to rounding; a lost state or a wrong position would differ by far more."""
    if found.shape != expected.shape:
        return False
    allowed = min(0.1, 1000 * torch.finfo(dtype).eps) * expected.abs().max()
    return bool((found - expected).abs().max() <= allowed)
