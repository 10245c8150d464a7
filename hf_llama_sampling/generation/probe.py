"""Probe what a model's forward can take, on a few tokens, once per model.

A config does not tell whether a model takes padding for text, or whether its state carries over from chunk to chunk. So
if a result depends on it, run a short text both ways through transformers' own loop and compare the logits. What this
module does not do: it refuses nothing; it answers yes or no.
"""

import copy
import weakref
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from .adapters import mixes_adapters, soft_prompts_of
from .caches import can_be_shared, window_of
from .model_info import device_of, length_limit, scored_size_of
from .model_state import drops_cache, trains
from .releases import CACHE_NAME, CACHE_NAMES, cache_in
from .view import Observer

# Families for which `tests/families` shows that neither a batch nor padding changes a row's logits. Others are probed.
KNOWN = {
    *("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt", "bloom", "falcon", "stablelm", "olmo2"),
    *("granite", "cohere", "starcoder2", "deepseek_v3", "glm4", "smollm3"),
}
# Of these, families whose masks hide the tokens that a sliding window drops from the cache. Others must be probed.
_WITH_WINDOWS = {"mistral", "mixtral", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe", "phi3", "starcoder2"}
# Of these, families that transformers' continuous batching (5.23) cannot run, or runs without using its pages.
_NOT_PAGED = {"bloom", "falcon", "gpt_neo", "gptj", "codegen", "stablelm", "deepseek_v3"}

# Answers by model, and by the question's name and what of the model may change it.
_FOUND: "weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]]" = weakref.WeakKeyDictionary()


class Probe:
    """Tells what a model's forward can take; each question is tried out when first asked, once per model.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model.
    """

    def __init__(self, model: Any, generate: Callable[..., Any]) -> None:
        self.model, self.generate = model, generate

    def takes_padding(self) -> bool:
        """Whether masked padding before a row leaves its logits unchanged."""
        if soft_prompts_of(self.model) is not None:
            return False  # PEFT puts them before the padding, not next to the text
        return self._holds("padding", _takes_padding)

    def moves_behind_padding(self) -> bool:
        """Whether a prefix's cache may be moved behind padding: not if the model counts columns as positions."""
        told = "position_ids" in signature(self.model.forward).parameters or is_known(self.model)
        return told and self.takes_padding()

    def keeps_rows_apart(self) -> bool:
        """Whether the other rows of a batch of one length leave a row's logits unchanged; some states mix rows."""
        return self._holds("rows", _keeps_rows_apart)

    def reads_in_chunks(self, width: int) -> bool:
        """Whether a text of `width` tokens may be prefilled in chunks with the same logits, in a cache to share."""
        if self._cache_belongs_to_peft() or not self.goes_on_from_a_cache(width):
            return False
        shared = _found(self.model, "cache", lambda: _has_a_shared_cache(self.model, self.generate))
        return shared and self.reads_in_pieces(width)

    def reads_in_pieces(self, width: int) -> bool:
        """Whether a text of `width` tokens may be prefilled in chunks with the same logits, with any kind of cache."""
        return self.goes_on_from_a_cache(width) and _found(
            self.model, "pieces", lambda: _reads_in_pieces(self.model, self.generate)
        )

    def reads_by_steps(self, width: int) -> bool:
        """Whether a text of `width` tokens may be forwarded token by token, like a completion, with the same logits."""
        return _window_hides(self.model, width) and self._holds("steps", _reads_by_steps)

    def goes_on_from_a_cache(self, width: int) -> bool:
        """Whether a text of `width` tokens may continue from a prefix's cache; see the function of this name."""
        return goes_on_from_a_cache(self.model, width)

    def resumes(self) -> bool:
        """Whether a text continues from its cache after another text was forwarded; some models keep state inside."""
        return self._holds("resumes", _resumes)

    def repeats_rows(self, width: int) -> bool:
        """Whether rows may continue, token by token, from copies of one row's cache of `width` tokens."""
        if self._cache_belongs_to_peft() or not self.goes_on_from_a_cache(width):
            return False
        return _found(self.model, "copies", lambda: _repeats_rows(self.model, self.generate))

    def _cache_belongs_to_peft(self) -> bool:
        """Whether a cache's content depends on soft prompts, or on an adapter per row."""
        return soft_prompts_of(self.model) is not None or mixes_adapters(self.model)

    def counts_positions(self) -> bool:
        """Whether the model numbers positions as the loop does, from 0 on."""
        if "position_ids" not in signature(self.model.forward).parameters or soft_prompts_of(self.model) is not None:
            return True
        return self._holds("positions", _counts_positions)

    def scores_prompts(self) -> bool:
        """Whether the logits at t depend on tokens 0..t alone (causal), so that they score the next token."""
        return self._holds("scores", _scores_prompts)

    def keeps_requests_apart(self, ask: Callable[[], bool]) -> bool:
        """Whether continuous batching leaves each request's logits unchanged; `ask` tries it out."""
        known = is_known(self.model) and self.model.config.model_type not in _NOT_PAGED
        return known or _found(self.model, "requests", ask)

    def _holds(self, question: str, ask: Callable[[Any, Callable[..., Any]], bool]) -> bool:
        if is_known(self.model):
            return True
        if trains(self.model) and not _found(self.model, "repeats", lambda: _repeats(self.model, self.generate)):
            return True  # dropout makes every comparison fail
        return _found(self.model, question, lambda: ask(self.model, self.generate))


def goes_on_from_a_cache(model: Any, width: int) -> bool:
    """Whether a text of `width` tokens may continue from a prefix's cache, as far as its length matters.

    It may not if rotary factors depend on the length, or if the cache has dropped tokens that the model still sees, or
    all, as in training with gradient checkpointing.
    """
    limit = length_limit(model)
    return (limit is None or width <= limit) and _window_hides(model, width) and not drops_cache(model)


def _window_hides(model: Any, width: int) -> bool:
    """Whether the model's mask hides the tokens that its cache drops of a text of `width` tokens."""
    window = window_of_model(model)
    if window is None or width <= window or not _may_take(model, CACHE_NAME):
        return True
    if is_known(model) and model.config.model_type in _WITH_WINDOWS:
        return True
    return _found(model, "window", lambda: _short_window_hides(model))


def _may_take(model: Any, name: str) -> bool:
    """Whether the forward may take an argument, by name or through `**kwargs`."""
    parameters = signature(model.forward).parameters
    return name in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())


def is_known(model: Any) -> bool:
    """Whether the model runs the unchanged code of a family in `KNOWN`."""
    if model.config.model_type not in KNOWN or ("forward" in vars(model) and not hasattr(model, "_hf_hook")):
        return False  # accelerate's hooks replace a forward and keep what it computes
    return all(_home_of(type(model), name) == "transformers" for name in ("forward", "prepare_inputs_for_generation"))


def _home_of(model_class: Any, name: str) -> Any:
    """Return the package that defines a method. Skip this package: its methods call those of the base class."""
    homes = (one.__module__.partition(".")[0] for one in model_class.__mro__ if name in vars(one))
    return next(home for home in homes if home != __name__.partition(".")[0])


def _found(model: Any, question: str, ask: Callable[[], bool]) -> bool:
    """Return the stored answer for this model as it is now; ask if there is none."""
    answers = _FOUND.setdefault(model, {})
    key = (
        question,
        model.dtype,
        trains(model),
        drops_cache(model),
        getattr(model.config, "_attn_implementation", None),
    )
    if key not in answers:
        answers[key] = ask()
    return answers[key]


class _GoOn(LogitsProcessor):
    """Force a text (B, T) to its end, and then one token, so that two runs can be compared."""

    def __init__(self, text: Tensor, token: int) -> None:
        self.text, self.token = text, token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns one-hot scores (B, V)."""
        column = input_ids.shape[1]
        tokens = self.text[:, column] if column < self.text.shape[1] else torch.full_like(input_ids[:, 0], self.token)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def _has_a_shared_cache(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    try:
        _, cache = _logits(generate, ids, torch.ones_like(ids))
    except Exception:  # whatever the error, the model returns no cache
        return False
    return can_be_shared(cache)


def _reads_in_pieces(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    try:
        whole, _ = _logits(generate, ids, torch.ones_like(ids))
        chunked, _ = _logits(generate, ids, torch.ones_like(ids), prefill_chunk_size=3)
    except Exception:
        return False
    return equal_up_to_rounding(chunked, whole, model.dtype)


def _reads_by_steps(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    try:
        whole, _ = _logits(generate, ids, torch.ones_like(ids))
        stepped, _ = _logits(generate, ids[:, :3], torch.ones_like(ids[:, :3]), text=ids)
    except Exception:
        return False
    return equal_up_to_rounding(stepped, whole, model.dtype)


def window_of_model(model: Any) -> int | None:
    """Return how many tokens of a text the model's cache keeps in its smallest layer, or None if all."""
    try:
        return window_of(DynamicCache(config=model.config))
    except Exception:  # some layers have no such cache
        return None


@torch.no_grad()
def with_short_windows(model: Any) -> Any:
    """Copy a model's modules, sharing the weights, with windows of 4 tokens."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, shared).eval()
    for owner in (small.config.get_text_config(decoder=True), *small.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, 4)
    return small


def _short_window_hides(model: Any) -> bool:
    """Try it with a window of 4, so that a short text exceeds it."""
    try:
        small = with_short_windows(model)
        ids, cache = _some_ids(model, 12)[None], DynamicCache(config=small.config)
        whole, parts = small(input_ids=ids, use_cache=False).logits, []
        for part in (ids[:, :6], *(ids[:, at : at + 1] for at in range(6, 12))):
            parts.append(small(input_ids=part, **{CACHE_NAME: cache}, use_cache=True).logits)
            if cache.get_seq_length() == 0:
                return True  # the model keeps its states elsewhere, so this cache drops nothing
    except Exception:  # the model cannot be copied, or takes other arguments
        return False
    return window_of(cache) == 4 and equal_up_to_rounding(torch.cat(parts, 1).float(), whole.float(), model.dtype)


def _resumes(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    ones = torch.ones_like(ids)
    try:
        config = GenerationConfig(do_sample=False, max_new_tokens=1, return_dict_in_generate=True)
        begun = generate(ids[:, :-1], attention_mask=ones[:, :-1], generation_config=config)
        whole, _ = _logits(generate, ids, ones)
        generate(ids.flip(1), attention_mask=ones, generation_config=config)
        resumed, _ = _logits(generate, ids, ones, cache=cache_in(begun))
    except Exception:
        return False
    return equal_up_to_rounding(resumed, whole, model.dtype)


def _repeats_rows(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8).expand(2, -1)
    try:
        whole, _ = _logits(generate, ids, torch.ones_like(ids))
        config = GenerationConfig(do_sample=False, max_new_tokens=1, return_dict_in_generate=True)
        first = generate(ids[:1, :-1], attention_mask=torch.ones_like(ids[:1, :-1]), generation_config=config)
        cache = cache_in(first)
        if type(cache) is not DynamicCache or cache.get_seq_length() != 7:
            return False
        cache.reorder_cache(torch.zeros(2, dtype=torch.long, device=ids.device))
        repeated, _ = _logits(generate, ids, torch.ones_like(ids), cache=cache)
    except Exception:  # a cache of another kind, or the model does not accept it
        return False
    return equal_up_to_rounding(repeated, whole, model.dtype)


def _repeats(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    first, _ = _logits(generate, ids, torch.ones_like(ids))
    second, _ = _logits(generate, ids, torch.ones_like(ids))
    return equal_up_to_rounding(second, first, model.dtype)


def _takes_padding(model: Any, generate: Callable[..., Any]) -> bool:
    ids, pads = _some_ids(model, 12), 7
    batch = torch.stack([ids, torch.cat([ids[:1].expand(pads), ids[pads:].flip(0)])])
    mask = torch.ones_like(batch)
    mask[1, :pads] = 0
    try:
        together, _ = _logits(generate, batch, mask)
        alone, _ = _logits(generate, batch[1:, pads:], mask[1:, pads:])
    except Exception:
        return False
    return equal_up_to_rounding(together[1:], alone, model.dtype)


def _keeps_rows_apart(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 5)
    batch = torch.stack([ids, ids.flip(0)])
    together, _ = _logits(generate, batch, torch.ones_like(batch))
    alone, _ = _logits(generate, batch[1:], torch.ones_like(batch[1:]))
    return equal_up_to_rounding(together[1:], alone, model.dtype)


class _AllLogits:
    """Observer that asks for the logits of all columns of the first forward, and keeps them."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.logits: Tensor | None = None  # (B, columns or fewer, V)

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.logits is None and "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = self.columns
        output = forward(*args, **kwargs)
        if self.logits is None:
            self.logits = output.logits[:, -self.columns :]
        return output


def _scores_prompts(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    whole, part = _AllLogits(8), _AllLogits(4)
    try:
        _logits(generate, ids, torch.ones_like(ids), observer=whole)
        _logits(generate, ids[:, :4], torch.ones_like(ids[:, :4]), observer=part)
    except Exception:
        return False
    if whole.logits is None or part.logits is None or whole.logits.shape[1] < 8:
        return False
    return equal_up_to_rounding(whole.logits[:, 3].float(), part.logits[:, -1].float(), model.dtype)


class _WithoutPositions:
    """Observer that forwards the first columns also without the loop's positions, and keeps both logits."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = not self.logits and kwargs.get("position_ids") is not None
        if first:
            fresh = {name: value for name, value in kwargs.items() if name not in ("position_ids", *CACHE_NAMES)}
            self.logits.append(forward(*args, **fresh).logits)
        output = forward(*args, **kwargs)
        if first:
            self.logits.append(output.logits)
        return output


def _counts_positions(model: Any, generate: Callable[..., Any]) -> bool:
    ids, both = _some_ids(model, 8)[None], _WithoutPositions()
    try:
        _logits(generate, ids, torch.ones_like(ids), observer=both)
    except Exception:  # the model needs the positions
        return True
    return not both.logits or equal_up_to_rounding(both.logits[0].float(), both.logits[1].float(), model.dtype)


def _some_ids(model: Any, count: int) -> Tensor:
    """Make some ids of the vocabulary, (count,)."""
    return torch.arange(1, count + 1, device=device_of(model)) * 37 % scored_size_of(model)


def _logits(
    generate: Callable[..., Any],
    ids: Tensor,
    mask: Tensor,
    *,
    cache: Any = None,
    text: Tensor | None = None,
    observer: Observer | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Generate three steps after `text`, which begins with ids (B, T) and is forced; return logits (B, 3, V), cache."""
    text = ids if text is None else text
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=3 + text.shape[1] - ids.shape[1],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    given = {} if cache is None else {CACHE_NAME: cache}
    output = generate(
        ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=[_GoOn(text, 1)],
        observer=observer,
        **given,
    )
    return torch.stack(output.logits[-3:], 1), cache_in(output)


def equal_up_to_rounding(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal up to the dtype's rounding at their size; a lost state would differ by far more."""
    size = expected.abs().where(expected.abs() < 1e30, 0.0).max()  # some models mask ids with the least float
    allowed = min(0.1, 1000 * torch.finfo(dtype).eps) * size
    return bool((found - expected).abs().max() <= allowed)
