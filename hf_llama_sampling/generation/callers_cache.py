"""Check that a caller's cache holds the beginning of the prompts, in the layout of the batch.

A cache does not say which text it holds. One of another text, or of the same text behind other padding, would give
wrong tokens without an error. So read the prompts' beginning again as far as the first layer's keys, and compare. What
this module does not do: it compares no keys of the layers above, which follow from the same tokens.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from .caches import keys_of
from .inference import is_watched
from .model_info import length_limit
from .model_state import trains
from .plan import Plan
from .releases import CACHE_NAME

# Of the largest key. Either may be rounded to 16 bits, which the dtype does not tell: under autocast it is float32.
_ROUNDING = 0.02
_READ = 512  # most columns to read again: more would cost percents of the call


class _FirstKeys(Exception):
    """Ends a forward with the first keys that it computes."""

    def __init__(self, layer: int, keys: Tensor) -> None:
        self.layer, self.keys = layer, keys


class _Catcher(DynamicCache):
    """A cache that takes nothing, and ends the forward."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise _FirstKeys(layer_idx, key_states)


def refuse_another_text(model: Any, generate: Callable[..., Any], plan: Plan, cache: Any, held: int) -> None:
    """Refuse a cache whose first keys are not those of the prompts' first `held` columns, as far as can be told.

    Where foreign code runs in the forward (hooks, accelerate's offload, FSDP), cutting it short could leave that in
    disorder, so nothing is checked; nor in training, where dropout may change keys.

    Args:
        model: a decoder-only causal language model.
        generate: transformers' own `generate` of that model.
        plan: the rows' layout.
        cache: the caller's.
        held: how many columns it holds.

    Raises:
        ValueError: it holds another text, or other padding; row and position are named.
    """
    if not held or trains(model) or any(map(is_watched, model.modules())):
        return
    read = held if length_limit(model) is not None else min(held, _READ)  # keys may depend on the text's length
    found = _first_keys(model, generate, plan, read)
    given = None if found is None else keys_of(cache, found.layer, held)
    if found is None or given is None or given.shape[:2] != found.keys.shape[:2]:
        return
    first = held - given.shape[2]  # the first column that the cache still holds
    if first >= read:
        return
    computed, given = found.keys[:, :, first:].float(), given[:, :, : read - first].float()
    shown = plan.layout[1][:, first:read].bool().to(computed.device)  # (B, columns)
    allowed = _ROUNDING * computed.abs().max()
    differs = ((computed - given).abs().amax((1, 3)) > allowed) & shown
    if differs.any():
        row, column = differs.nonzero()[0].tolist()
        position = column + first - plan.offsets[row]
        raise ValueError(
            "past_key_values must hold the beginning of the prompts, behind the same padding, and at position "
            f"{position} of row {plan.row_ids[row]} it holds something else: leave it out, and pass "
            "prompt_cache=PromptCache() to go on from earlier calls"
        )


def _first_keys(model: Any, generate: Callable[..., Any], plan: Plan, held: int) -> _FirstKeys | None:
    """Compute the keys (B, heads, held, size) of the first layer that has some; None if it keeps them elsewhere."""
    ids, mask = plan.layout
    config = GenerationConfig(do_sample=False, max_new_tokens=1)
    try:
        generate(
            ids[:, :held],
            attention_mask=mask[:, :held],
            generation_config=config,
            **{CACHE_NAME: _Catcher(config=model.config)},
        )
    except _FirstKeys as found:
        return found
    except Exception:  # it takes other arguments, or another kind of cache
        return None
    return None
