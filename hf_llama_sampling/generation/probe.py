"""Trying out what a model's forward can take, on a few tokens, once per model.

A config does not say whether a model reads padding as text, or whether its state goes on from chunk to chunk. So where
an answer depends on it, a short text is run both ways through transformers' own loop and the logits are compared. What
this module does not do: it refuses nothing; it answers yes or no.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from .adapters import mixes_adapters, soft_prompts_of
from .caches import can_be_shared
from .model_info import device_of, length_limit, vocab_size_of
from .releases import CACHE_NAME, cache_in
from .view import Observer

# Families of which `tests/families` shows that a row stays what it is alone, in a batch and behind padding. Others are
# tried out.
KNOWN = {
    *("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("phi", "phi3", "gpt2", "gpt_neo", "gpt_neox", "gptj", "codegen", "opt", "bloom", "falcon", "stablelm", "olmo2"),
    *("granite", "cohere", "starcoder2", "deepseek_v3", "glm4", "smollm3"),
}

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

    def keeps_rows_apart(self) -> bool:
        """Whether a row's logits stay what they are alone in a batch of one length; some recurrent states mix rows."""
        return self._holds("rows", _keeps_rows_apart)

    def reads_in_chunks(self, width: int) -> bool:
        """Whether a text of `width` tokens may be prefilled chunk by chunk with the same result."""
        if self._cache_belongs_to_peft() or self._rotary_grows(width):
            return False
        return _found(self.model, "chunks", lambda: _reads_in_chunks(self.model, self.generate))

    def repeats_rows(self, width: int) -> bool:
        """Whether rows may go on, token by token, from copies of one row's cache of `width` tokens."""
        if self._cache_belongs_to_peft() or self._rotary_grows(width):
            return False
        return _found(self.model, "copies", lambda: _repeats_rows(self.model, self.generate))

    def _cache_belongs_to_peft(self) -> bool:
        """Whether what a cache holds depends on soft prompts, or on which adapter is each row's."""
        return soft_prompts_of(self.model) is not None or mixes_adapters(self.model)

    def _rotary_grows(self, width: int) -> bool:
        """Whether rotary factors depend on the length of a text of so many tokens."""
        limit = length_limit(self.model)
        return limit is not None and width > limit

    def scores_prompts(self) -> bool:
        """Whether a column's logits are what the loop gets for the text up to it, so that they score the next token."""
        return self._holds("scores", _scores_prompts)

    def _holds(self, question: str, ask: Callable[[Any, Callable[..., Any]], bool]) -> bool:
        if self.model.training or is_known(self.model):  # in training, dropout would be all that is found
            return True
        return _found(self.model, question, lambda: ask(self.model, self.generate))


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


class _Always(LogitsProcessor):
    """Go on with one token, so that two runs can be compared step by step."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: (B, T); scores: (B, V). Returns one-hot scores (B, V)."""
        only = torch.full_like(scores, -torch.inf)
        only[:, self.token] = 0
        return only


def _reads_in_chunks(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 8)[None]
    try:
        whole, cache = _logits(generate, ids, torch.ones_like(ids))
        if not can_be_shared(cache):
            return False
        chunked, _ = _logits(generate, ids, torch.ones_like(ids), prefill_chunk_size=3)
    except Exception:  # whatever a model says to a chunk, it does not take it
        return False
    return _equal(chunked, whole, model.dtype)


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
    return _equal(repeated, whole, model.dtype)


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
    return _equal(together[1:], alone, model.dtype)


def _keeps_rows_apart(model: Any, generate: Callable[..., Any]) -> bool:
    ids = _some_ids(model, 5)
    batch = torch.stack([ids, ids.flip(0)])
    together, _ = _logits(generate, batch, torch.ones_like(batch))
    alone, _ = _logits(generate, batch[1:], torch.ones_like(batch[1:]))
    return _equal(together[1:], alone, model.dtype)


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
    return _equal(whole.logits[:, 3].float(), part.logits[:, -1].float(), model.dtype)


def _some_ids(model: Any, count: int) -> Tensor:
    """Some ids of the vocabulary, (count,)."""
    return torch.arange(1, count + 1, device=device_of(model)) * 37 % vocab_size_of(model)


def _logits(
    generate: Callable[..., Any],
    ids: Tensor,
    mask: Tensor,
    *,
    cache: Any = None,
    observer: Observer | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """The logits of three steps after ids (B, T), (B, 3, V), and the cache."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True, **options
    )
    given = {} if cache is None else {CACHE_NAME: cache}
    output = generate(
        ids, attention_mask=mask, generation_config=config, logits_processor=[_Always(1)], observer=observer, **given
    )
    return torch.stack(output.logits, 1), cache_in(output)


def _equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits are equal up to the model's rounding at their size; a state that is lost is off by far more."""
    size = expected.abs().where(expected.abs() < 1e30, 0.0).max()  # some models mask ids with the least float
    allowed = min(0.1, 1000 * torch.finfo(dtype).eps) * size
    return bool((found - expected).abs().max() <= allowed)
