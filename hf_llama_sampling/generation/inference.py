"""Run forwards under `torch.inference_mode`, if only known code runs in them and none of their tensors is kept.

A tensor made in that mode can never take part in training. So the mode is on only around forwards whose modules are all
transformers' own; tensors that leave a run are made ordinary, without a copy. The loop around the forwards is not under
the mode. What this module does not do: it changes no number.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import Cache, DynamicCache

from .model_info import length_limit
from .model_state import HOOKS
from .probe import is_known
from .releases import CACHE_NAME
from .view import Observer, inside

_KNOWN_HOMES = ("torch", "transformers", __name__.partition(".")[0])
_KNOWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def in_inference_mode(model: Any, observer: Observer | None) -> Observer | None:
    """Wrap `observer` so that forwards run in inference mode, if they keep no tensor; else return it unchanged."""
    return inside(_forward, observer) if _leaves_nothing(model) else observer


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with contextlib.nullcontext() if _a_mode_watches() else torch.inference_mode():
        return forward(*args, **kwargs)


def _a_mode_watches() -> bool:
    """Whether a torch dispatch or function mode is active: it may keep the tensors that it sees."""
    modes = (_get_current_dispatch_mode(), _get_current_function_mode())  # type: ignore[no-untyped-call]
    return any(mode is not None for mode in modes)


def may_be_compiled(arguments: dict[str, Any]) -> bool:
    """Whether transformers may compile the steps (static caches do): code of ours around them would break the graph."""
    config, cache = arguments.get("generation_config"), arguments.get(CACHE_NAME)
    asked = (getattr(config, name, None) is not None for name in ("cache_implementation", "compile_config"))
    return any(asked) or not (cache is None or type(cache) is DynamicCache)


def _leaves_nothing(model: Any) -> bool:
    """Whether a forward keeps no tensor in the model or its hooks."""
    return (
        not model.training
        and is_known(model)
        and length_limit(model) is None  # recomputed rotary factors are kept in the model
        and getattr(model, "hf_quantizer", None) is None
        and (getattr(model, "tp_size", None) or 1) == 1
        and getattr(model.config, "_attn_implementation", None) in _KNOWN_ATTENTION
        and not any(getattr(torch.nn.modules.module, f"_global{name}") for name in HOOKS)
        and not any(map(is_watched, model.modules()))
    )


def is_watched(module: Any) -> bool:
    """Whether foreign code runs in a module's forward: a class, a hook, or a replaced forward (accelerate's too)."""
    own = vars(module)
    return (
        type(module).__module__.partition(".")[0] not in _KNOWN_HOMES
        or "forward" in own
        or any(own.get(name) for name in HOOKS)
    )


def as_ordinary(value: Any) -> Any:
    """Make the tensors of a value ordinary, for autograd: nested tuples of tensors, or a cache (changed in place)."""
    if torch.is_inference_mode_enabled():  # the caller's own
        return value
    if isinstance(value, Tensor):
        return _same_memory(value) if value.is_inference() else value
    if isinstance(value, tuple):
        return tuple(map(as_ordinary, value))
    if isinstance(value, Cache):
        for layer in value.layers:
            vars(layer).update({name: as_ordinary(one) for name, one in vars(layer).items() if isinstance(one, Tensor)})
    return value


def _same_memory(tensor: Tensor) -> Tensor:
    """Make an ordinary tensor over an inference tensor's memory."""
    layout = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *layout)
