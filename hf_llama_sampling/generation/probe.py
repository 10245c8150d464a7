"""Trying out what a model's forward can take, on a few tokens, once per model.

A config does not say whether a model reads padding as text, or whether its state goes on from chunk to chunk. So where
an answer depends on it, a short text is run both ways through transformers' own loop and the logits are compared. What
this module does not do: it refuses nothing; it answers yes or no.
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
from .model_info import device_of, length_limit, vocab_size_of
from .releases import CACHE_NAME, CACHE_NAMES, cache_in
from .view import Observer

# Families of which `tests/families` shows that a row stays what it is alone, in a batch and behind padding. Others are
# tried out.
KNOWN = {
    *("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt", "bloom", "falcon", "stablelm", "olmo2"),
    *("granite", "cohere", "starcoder2", "deepseek_v3", "glm4", "smollm3"),
}
# Those of them whose masks hide what their caches forget. Others forget too, if their config names a window.
_WITH_WINDOWS = {"mistral", "mixtral", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen3_moe", "phi3", "starcoder2"}
# Those of them that transformers' continuous batching does not run (5.23), or runs without reading its pages.
_NOT_PAGED = {"bloom", "falcon", "gpt_neo", "gptj", "codegen", "stablelm", "deepseek_v3"}

# What was found, by model: a name of the question, and the answer.
_FOUND: "weakref.WeakKeyDictionary[Any, dict[str, bool]]" = weakref.WeakKeyDictionary()


class Probe:
    """What the forward of a model can take, tried out when it is asked, and once per model.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model.
    """

    def __init__(self, model: Any, generate: Callable[..., Any]) -> None:
        self.model, self.generate = model, generate

    def takes_padding(self) -> bool:
        """Whether a row's logits stay what they are alone when padding, masked, stands before it."""
        if soft_prompts_of(self.model) is not None:
            return False  # they stand before the padding, and would move away from their text
        return self._holds("padding", _takes_padding)

    def moves_behind_padding(self) -> bool:
        """Whether a beginning's cache may be put behind padding: not where columns are the model's positions."""
        told = "position_ids" in signature(self.model.forward).parameters or is_known(self.model)
        return told and self.takes_padding()

    def keeps_rows_apart(self) -> bool:
        """Whether a row's logits stay what they are alone in a batch of one length; some recurrent states mix rows."""
        return self._holds("rows", _keeps_rows_apart)

    def reads_in_chunks(self, width: int) -> bool:
        """Whether a text of `width` tokens may be prefilled chunk by chunk with the same result."""
        if self._cache_belongs_to_peft() or not self.goes_on_from_a_cache(width):
            return False
        shared = _found(self.model, "cache", lambda: _has_a_shared_cache(self.model, self.generate))
        return shared and self.reads_in_pieces(width)

    def reads_in_pieces(self, width: int) -> bool:
        """The same whatever the cache is; `reads_in_chunks` asks for one that rows can share, too."""
        return self.goes_on_from_a_cache(width) and _found(
            self.model, "pieces", lambda: _reads_in_pieces(self.model, self.generate)
        )

    def reads_by_steps(self, width: int) -> bool:
        """Whether a text of `width` tokens may be read token by token, as its completion is, with the same result."""
        return _window_hides(self.model, width) and self._holds("steps", _reads_by_steps)

    def goes_on_from_a_cache(self, width: int) -> bool:
        """Whether a text of `width` tokens leaves the cache of its beginning what it was."""
        return goes_on_from_a_cache(self.model, width)

    def resumes(self) -> bool:
        """Whether a text goes on from its cache though another text was read since; some states are the model's."""
        return self._holds("resumes", _resumes)

    def repeats_rows(self, width: int) -> bool:
        """Whether rows may go on, token by token, from copies of one row's cache of `width` tokens."""
        if self._cache_belongs_to_peft() or not self.goes_on_from_a_cache(width):
            return False
        return _found(self.model, "copies", lambda: _repeats_rows(self.model, self.generate))

    def _cache_belongs_to_peft(self) -> bool:
        """Whether what a cache holds depends on soft prompts, or on which adapter is each row's."""
        return soft_prompts_of(self.model) is not None or mixes_adapters(self.model)

    def counts_positions(self) -> bool:
        """Whether the model's own count of positions is the loop's, from 0 on."""
        if "position_ids" not in signature(self.model.forward).parameters or soft_prompts_of(self.model) is not None:
            return True
        return self._holds("positions", _counts_positions)

    def scores_prompts(self) -> bool:
        """Whether a column's logits are what the loop gets for the text up to it, so that they score the next token."""
        return self._holds("scores", _scores_prompts)

    def keeps_requests_apart(self, ask: Callable[[], bool]) -> bool:
        """Whether requests of continuous batching stay what they are alone; `ask` tries it."""
        known = is_known(self.model) and self.model.config.model_type not in _NOT_PAGED
        return known or _found(self.model, "requests", ask)

    def _holds(self, question: str, ask: Callable[[Any, Callable[..., Any]], bool]) -> bool:
        if self.model.training or is_known(self.model):  # in training, dropout would be all that is found
            return True
        return _found(self.model, question, lambda: ask(self.model, self.generate))


def goes_on_from_a_cache(model: Any, width: int) -> bool:
    """Whether a text of `width` tokens may go on from the cache of its beginning, as far as its length matters.

    It may not where rotary factors depend on the length, or where the cache has forgotten what the model still sees.
    """
    limit = length_limit(model)
    return (limit is None or width <= limit) and _window_hides(model, width)


def _window_hides(model: Any, width: int) -> bool:
    """Whether the model does not look at what its cache forgets of a text of `width` tokens."""
    window = _window_of(model)
    if window is None or width <= window or not _may_take(model, CACHE_NAME):
        return True
    if is_known(model) and model.config.model_type in _WITH_WINDOWS:
        return True
    return _found(model, "window", lambda: _short_window_hides(model))


def _may_take(model: Any, name: str) -> bool:
    """Whether the forward may take an argument: some wrappers do not spell theirs out."""
    parameters = signature(model.forward).parameters
    return name in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())


def is_known(model: Any) -> bool:
    """Whether the model runs a family's own code, which the tests found to keep rows as they are alone."""
    if model.config.model_type not in KNOWN or ("forward" in vars(model) and not hasattr(model, "_hf_hook")):
        return False  # accelerate's hooks replace a forward and keep what it computes
    return all(_home_of(type(model), name) == "transformers" for name in ("forward", "prepare_inputs_for_generation"))


def _home_of(model_class: Any, name: str) -> Any:
    """The package that defines a method; this one's classes hand on to those that they derive from."""
    homes = (one.__module__.partition(".")[0] for one in model_class.__mro__ if name in vars(one))
    return next(home for home in homes if home != __name__.partition(".")[0])


def _found(model: Any, question: str, ask: Callable[[], bool]) -> bool:
    """The answer for this model, looked for once."""
    answers = _FOUND.setdefault(model, {})
    if question not in answers:
        answers[question] = ask()
    return answers[question]


class _GoOn(LogitsProcessor):
    """Go on with a text (B, T) as far as it goes, and then with one token, so that two runs can be compared."""

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
    except Exception:  # whatever a model says to a cache, it does not give one
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


def _window_of(model: Any) -> int | None:
    """How many tokens the model's cache remembers of a text in each layer, or None if all."""
    try:
        return window_of(DynamicCache(config=model.config))
    except Exception:  # layers for which there is no such cache
        return None


@torch.no_grad()
def _short_window_hides(model: Any) -> bool:
    """Try it on a copy of the modules, with the model's own weights and a window of 4: texts may stay short."""
    try:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        small = copy.deepcopy(model, shared).eval()
        for owner in (small.config.get_text_config(decoder=True), *small.modules()):
            for name in ("sliding_window", "attention_chunk_size"):
                if isinstance(getattr(owner, name, None), int):
                    setattr(owner, name, 4)
        ids, cache = _some_ids(model, 12)[None], DynamicCache(config=small.config)
        whole, parts = small(input_ids=ids, use_cache=False).logits, []
        for part in (ids[:, :6], *(ids[:, at : at + 1] for at in range(6, 12))):
            parts.append(small(input_ids=part, **{CACHE_NAME: cache}, use_cache=True).logits)
            if cache.get_seq_length() == 0:
                return True  # its states are its own, and no such cache forgets for it
    except Exception:  # a model that cannot be copied, or is not called so
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
    except Exception:  # a cache of another kind, or one that is not taken
        return False
    return equal_up_to_rounding(repeated, whole, model.dtype)


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
    """An observer that asks for the logits of all columns of the first forward, and keeps them."""

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
    """An observer that forwards the first columns once more without the loop's positions, and keeps both logits."""

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
    except Exception:  # a model that needs them
        return True
    return not both.logits or equal_up_to_rounding(both.logits[0].float(), both.logits[1].float(), model.dtype)


def _some_ids(model: Any, count: int) -> Tensor:
    """Some ids of the vocabulary, (count,)."""
    return torch.arange(1, count + 1, device=device_of(model)) * 37 % vocab_size_of(model)


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
    """The logits of three steps after ids (B, T), (B, 3, V), and the cache; after a text that goes on from them."""
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
    """Whether logits are equal up to the model's rounding at their size; a state that is lost is off by far more."""
    size = expected.abs().where(expected.abs() < 1e30, 0.0).max()  # some models mask ids with the least float
    allowed = min(0.1, 1000 * torch.finfo(dtype).eps) * size
    return bool((found - expected).abs().max() <= allowed)
